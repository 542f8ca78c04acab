"""The errors a user can meet: one tree, each with the exit status of the command line.

    AccumTrainerError        1   training cannot go on
      DivergedError          1   too many of the last windows gave no update
      ConfigError            2   an option, or several options together, cannot be obeyed
      DataError              2   the data cannot be read, or cannot be trained on
      EngineError            2   the engine asked for is not the engine in force, or cannot do this
      CheckpointError        2   a checkpoint is missing, damaged, or belongs to another run
      LoopError              2   a training step that was given to `verify --loop` raised

Every message gives the values, the rule they break, and the remedy, in that order. The command line
prints the message alone; nobody should need the traceback of a mistake in an option.
"""

from __future__ import annotations


class AccumTrainerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 1


class DivergedError(AccumTrainerError):
    """Too many of the last windows gave no update."""


class ConfigError(AccumTrainerError):
    """An option, or several options together, cannot be obeyed."""

    exit_status = 2


class DataError(AccumTrainerError):
    """The data cannot be read, or cannot be trained on."""

    exit_status = 2


class EngineError(AccumTrainerError):
    """The engine asked for is not the engine in force, or cannot hold a promise."""

    exit_status = 2


class CheckpointError(AccumTrainerError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_status = 2


class LoopError(AccumTrainerError):
    """A training step that was given to `verify --loop` raised an exception."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a clause that a message of ours goes on after."""
    said = str(error).strip()
    return said.splitlines()[0].rstrip(" .;:") if said else repr(error)
