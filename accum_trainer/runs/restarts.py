"""Whether a launcher starts its job again after a failure, by what the run directory says.

`requeue` is the same for a batch job. A restart that wrote a checkpoint further on than all before
is progress, and the count begins anew: a job that fails once a day may go on, and one that fails at
every start ends. Reads files; knows no processes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import CheckpointError
from accum_trainer.launch.restarting import Restarting
from accum_trainer.runs.json_file import read_json
from accum_trainer.train.run_folder import DIVERGENCE, LAST, RESULT


@dataclass(frozen=True)
class _Written:
    """The checkpoint that was written last: its update, and what tells this writing from others."""

    update: int
    at: tuple[int, int] | None


class Restarts(Restarting):
    """The restarts of one launch; made before its first start.

    Args:
        run: the run directory.
        train: arguments of `train` for the first start.
        resume: its `resume` option.
        most: restarts in a row without a new checkpoint.
    """

    def __init__(self, run: Path, train: Sequence[str], resume: str, most: int) -> None:
        self._run, self._train, self._resume, self._most = run, list(train), resume, most
        self._before, self._result_before = _last_written(run), _written_at(run / RESULT)
        self._has_written = False
        goes_on = resume == "auto" and self._before is not None
        self._furthest = self._before.update if goes_on and self._before else -1
        self._without_progress = 0

    def after_failure(self) -> tuple[Sequence[str] | None, str]:
        """(arguments of `train` for the next start or None, a line for the user)."""
        if self._is_diverged():
            return None, "not started again: the training has diverged, and would again"
        last = _last_written(self._run)
        if last is not None and last != self._before:
            self._has_written = True
            if last.update > self._furthest:
                self._furthest, self._without_progress = last.update, 0
        if self._without_progress >= self._most:
            times = f"{self._most} restart{'s' if self._most > 1 else ''} in a row"
            return None, f"not started again: {times} ended without a new checkpoint"
        self._without_progress += 1
        goes_on = self._has_written or self._resume == "auto"
        place = f" from the checkpoint of update {last.update}" if last and goes_on else ""
        return self._arguments(), (
            f"starting all processes again{place}, restart {self._without_progress} of at most "
            f"{self._most} without a new checkpoint"
        )

    def _is_diverged(self) -> bool:
        result = self._run / RESULT
        with contextlib.suppress(CheckpointError):
            diverged = read_json(result).get("stopped_by") == DIVERGENCE
            return diverged and _written_at(result) != self._result_before
        return False

    def _arguments(self) -> list[str]:
        """What was asked for once is not asked for again: `anew` would delete what this launch has
        written, a path would go back, and `never` would refuse it."""
        if self._resume == "never" or (self._resume != "auto" and self._has_written):
            return [*self._train, "--resume", "auto"]
        return self._train


def _last_written(run: Path) -> _Written | None:
    with contextlib.suppress(CheckpointError):
        named = re.fullmatch(r".*step-(\d+)", str(read_json(run / LAST).get("checkpoint")))
        if named is not None:
            return _Written(int(named[1]), _written_at(run / LAST))
    return None


def _written_at(path: Path) -> tuple[int, int] | None:
    """Tells one writing of a file that is always replaced whole from another."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns
    return None
