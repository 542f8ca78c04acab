"""Processes that accelerate's launcher was asked for and did not start.

`accelerate launch --cpu --num_processes 2`, a configuration of type MULTI_CPU, and `--num_processes
2` without a GPU start one process. It has no WORLD_SIZE, so it looks like a training on one. Two
traces give it away: the launcher's ACCELERATE_* variables, and MASTER_ADDR and MASTER_PORT, which
the launcher sets for more than one process only. It knows the environment, no engine.
"""

from __future__ import annotations

import os
import re

from accum_trainer.errors import ConfigError, EngineError

# accelerate's launchers set it, people do not.
_MARK = "ACCELERATE_DYNAMO_BACKEND"
_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
# Variables in which the launchers of torch and MPI give the number of processes.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_REMEDY = (
    "use `accelerate launch --multi_gpu --num_processes N` (without GPUs too: the processes meet "
    "over gloo), `torchrun --nproc_per_node N`, or a file of `accum-trainer config create "
    "multi-gpu`"
)


def launched_processes() -> int:
    """How many processes the launcher started, this one included.

    Raises:
        ConfigError: WORLD_SIZE does not say.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise ConfigError(
            f"WORLD_SIZE={text} is no number of processes; unset it, or start the program with a "
            "launcher, which sets it"
        )
    return int(text)


def refuse_lost_processes() -> None:
    """Raise an EngineError if accelerate's launcher was asked for several processes and started
    one."""
    is_lost, asked = _launched_alone()
    if is_lost:
        raise EngineError(
            f"accelerate launch was asked for {asked or 'several'} processes and started one, as "
            "it does with --cpu, with distributed_type MULTI_CPU and without GPUs: this one would "
            f"train alone; {_REMEDY}"
        )


def note_on_lost_processes() -> str | None:
    """A note if the launcher may have been asked for several processes; None if it was not."""
    if _launched_alone() != (None, None):
        return None
    return (
        "accelerate launch started this one process, and MASTER_ADDR is set; if several processes "
        "were asked for, " + _REMEDY
    )


def _launched_alone() -> tuple[bool | None, int | None]:
    """(whether processes are lost, how many were asked for); None for unknown."""
    here = os.environ
    if (
        _MARK not in here
        or any(name in here for name in _SIZES)
        or not all(n in here for n in _MEETING_PLACE)
    ):
        return False, None
    launcher = _launcher()
    if launcher is None:
        return None, None
    command, its_environment = launcher
    stated = re.search(r"--num[_-]processes[= ](\d+)", " ".join(command))
    asked = int(stated.group(1)) if stated else None
    if any(its_environment.get(name) != here[name] for name in _MEETING_PLACE):
        # The launcher set the meeting place, so it was asked for several processes.
        return True, asked
    return (asked > 1 if asked is not None else None), asked


def _launcher() -> tuple[list[str], dict[str, str]] | None:
    """Command line and environment of the nearest parent without the launcher's variables."""
    import psutil  # a dependency of accelerate

    try:
        for process in psutil.Process().parents():
            environment = process.environ()
            if _MARK not in environment:
                return process.cmdline(), environment
    except (psutil.Error, OSError):  # gone, another user's, or hidden by the system
        return None
    return None
