"""What is saved when memory runs out in a window that cannot be run again in parts.

Until the optimizer steps, weights and optimizer are those of the last finished update; a step that
failed may have changed a part of them. The other processes wait for this one in an exchange that
never ends, so it saves alone, if it has the whole state. Knows the training and its writer; neither
windows nor what memory was wanted for.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from pathlib import Path
from typing import Any

from accum_trainer.engine.ranks import Alone, StoreLostError
from accum_trainer.errors import EngineError, first_line
from accum_trainer.train.best_checkpoint import BestCheckpoint
from accum_trainer.train.checkpoint_folder import folder_name
from accum_trainer.train.checkpoint_writer import CheckpointWriter, is_being_written
from accum_trainer.train.records import Tally
from accum_trainer.train.resume import capture
from accum_trainer.train.setup import Training

_CHOSEN, _DONE = "accum_trainer/rescue", "accum_trainer/rescue-done"
# Seconds: for a checkpoint that was begun before, whose other writers may wait like this process;
# for another process that saves.
_EARLIER_SEC, _OTHER_SEC = 60.0, 600.0


def ran_out_of_memory(engine: Any, error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that memory ran out."""
    causes = (error, error.__cause__)
    return any(isinstance(one, Exception) and engine.is_out_of_memory(one) for one in causes)


def release(error: BaseException | None) -> str:
    """The first line of an error; what its frames held, such as activations, is given back."""
    said = first_line(error) if error is not None else ""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return said


class Rescue:
    """Saves the last finished update; made where memory ran out.

    Args:
        training: the training.
        run: the run directory.
        writer: of its checkpoints so far.
        best: the best checkpoint so far.
        tally: of its records.
        keep: newest checkpoints to keep.
    """

    def __init__(
        self,
        training: Training,
        run: Path,
        writer: CheckpointWriter,
        best: BestCheckpoint,
        tally: Tally,
        keep: int,
    ) -> None:
        self._training, self._run, self._writer = training, run, writer
        self._best, self._tally, self._keep = best, tally, keep
        self._engine = training.accumulator.engine

    def save(self) -> str:
        """Save it, or let another process that ran out of memory too; what became of it, as a
        clause. Not collective."""
        updates = self._training.accumulator.num_updates
        if updates == 0:
            return "no update was made before, so nothing is lost"
        if self._engine.world_size > 1 and self._engine.shards_optimizer:
            return (
                f"each process has a part of {self._engine.name}'s state only and the others "
                "cannot be reached, so the last checkpoint stays"
            )
        said = f"the state after update {updates} is saved"
        try:
            self._engine.post_once(_CHOSEN, str(self._engine.rank))
            chosen = self._engine.posted_once(_CHOSEN) or str(self._engine.rank)
            if chosen != str(self._engine.rank):
                is_done = self._wait_for_other()
                return said if is_done else f"process {chosen} may have saved update {updates}"
            failure = self._write(updates)
        except StoreLostError as lost:
            return f"the last checkpoint stays, because {lost}"
        except Exception as error:  # of any type, memory again among them: the first one is raised
            failure = release(error)
        with contextlib.suppress(StoreLostError):
            self._engine.post_once(_DONE, failure or "saved")
        return failure or said

    def _write(self, updates: int) -> str:
        self._writer.wait()
        until = time.monotonic() + _EARLIER_SEC
        while is_being_written(self._run) and time.monotonic() < until:
            time.sleep(0.1)
        best = self._best.noted()
        writer = CheckpointWriter(Alone(), self._run, self._keep)
        snapshot = capture(self._training, self._tally, best, alone=True)
        kept = folder_name(best["updates"]) if best is not None else ""
        writer.save(updates, snapshot, is_last=True, keep_also=kept)
        return writer.wait()

    def _wait_for_other(self) -> bool:
        """Wait until the process that saves is done: a launcher ends it soon after this one."""
        until = time.monotonic() + _OTHER_SEC
        while (found := self._engine.posted_once(_DONE)) is None and time.monotonic() < until:
            time.sleep(0.1)
        return found == "saved"


def describe(error: str, is_whole: bool, outcome: str, folder: Path) -> EngineError:
    """The error that ends the run.

    Args:
        error: the first line of what ended the window.
        is_whole: the optimizer had not begun to step.
        outcome: of `Rescue.save`.
    """
    if not is_whole:
        outcome = (
            "it ran out in the update itself, which may have changed a part of the weights, so "
            "the last checkpoint stays"
        )
    return EngineError(
        f"{error}; {outcome}. The same command with --output-dir {folder} continues it, also with "
        "a smaller --batch-size if --global-batch-size gives the effective batch, or with "
        "--gradient-checkpointing"
    )
