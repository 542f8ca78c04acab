"""The checkpoint with the lowest evaluation loss, kept besides the newest ones.

Each checkpoint says which was the best by then, itself included. So a run that goes on knows it,
and one that goes back to an earlier checkpoint does not compare with evaluations that it has given
up. A best checkpoint that could not be written is none: the one before stays the best. Knows no
model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import CheckpointError
from accum_trainer.train.checkpoint import read_state
from accum_trainer.train.checkpoint_folder import folder_name
from accum_trainer.train.checkpoint_writer import CheckpointWriter
from accum_trainer.train.run_folder import CHECKPOINTS


@dataclass(frozen=True)
class Best:
    """An evaluation whose checkpoint is kept.

    Attributes:
        updates: after which it was evaluated.
        eval_loss: mean loss per target.
        rows: identity of the rows that were evaluated on; losses on others are not compared.
    """

    updates: int
    eval_loss: float
    rows: str

    @property
    def checkpoint(self) -> str:
        """Relative to the run directory."""
        return f"{CHECKPOINTS}/{folder_name(self.updates)}"

    def as_result(self) -> dict[str, Any]:
        """As result.json has it."""
        return {k: getattr(self, k) for k in ("checkpoint", "updates", "eval_loss")}


class BestCheckpoint:
    """The best checkpoint of one run; made on all processes.

    Args:
        ranks: this process among the others.
        writer: of the run's checkpoints.
        rows: identity of the evaluation rows; None if no best checkpoint is to be kept.
    """

    def __init__(self, ranks: Ranks, writer: CheckpointWriter, rows: str | None) -> None:
        self._ranks, self._writer, self._rows = ranks, writer, rows
        # On disk; being written; evaluated, and saved next.
        self._kept: Best | None = None
        self._written: Best | None = None
        self._next: Best | None = None

    @property
    def is_wanted(self) -> bool:
        return self._rows is not None

    @property
    def best(self) -> Best | None:
        """The best; after a save, once the writer has ended without a failure."""
        return self._written or self._kept

    def continue_from(self, checkpoint: Path, run: Path) -> list[str]:
        """Take the best that `checkpoint` knows of, if `run` still has it; return notes on that.
        Collective."""
        found = self._ranks.on_main(_best_known_to, checkpoint, run, self._rows)
        self._kept, note = self._ranks.gather_objects(found)[0]
        return [note] if note else []

    def is_beaten_by(self, updates: int, eval_loss: float) -> bool:
        """Whether this evaluation is the best so far, and a checkpoint is due; on all processes the
        same. Collective."""
        if self._rows is None:
            return False
        self._settle()
        eval_loss = self._ranks.gather_objects(eval_loss)[0]
        if not eval_loss < (self._kept.eval_loss if self._kept is not None else math.inf):
            return False
        self._next = Best(updates, eval_loss, self._rows)
        return True

    def begin_save(self) -> dict[str, Any] | None:
        """What the next checkpoint says of the best. Collective."""
        if self._rows is None:
            return None
        self._settle()
        self._written, self._next = self._next, None
        return self.noted()

    def noted(self) -> dict[str, Any] | None:
        """What a checkpoint says of the best. Not collective."""
        return dataclasses.asdict(self.best) if self.best is not None else None

    def _settle(self) -> None:
        """Learn whether the checkpoint that was begun last is whole."""
        failure = self._ranks.gather_objects(self._writer.wait())[0]
        if self._written is not None and not failure:
            self._kept = self._written
        self._written = None

    def finish(self) -> None:
        """Learn it at the end of a run that makes no other checkpoint. Collective."""
        if self._rows is not None:
            self._settle()


def _best_known_to(checkpoint: Path, run: Path, rows: str | None) -> tuple[Best | None, str]:
    """(the best if `run` has it and it was evaluated on `rows`, a note for the user)."""
    best = _noted_in(checkpoint)
    if best is None:
        return None, ""
    was = f"the best evaluation before was {best.eval_loss:.4f} after update {best.updates}"
    is_there = _noted_in(run / best.checkpoint) == best
    if rows is None:
        lost = f"{was}; without keep_best its checkpoint is deleted like any other"
        return None, lost if is_there else ""
    # A run that went back writes others of the same name.
    if not is_there:
        return None, f"{was}; {run / best.checkpoint} is not there, so the next one is the best"
    if best.rows != rows:
        return None, f"{was}, on other evaluation rows; it is not compared, nor kept from now on"
    return best, f"{was}; it is kept in {run / best.checkpoint}"


def _noted_in(checkpoint: Path) -> Best | None:
    """The best that a checkpoint knows of; None if it is damaged or missing, too."""
    try:
        best = Best(**read_state(checkpoint)["best"])
    except (CheckpointError, KeyError, TypeError):
        return None
    kinds = [type(value) for value in dataclasses.astuple(best)]
    return best if kinds == [int, float, str] else None
