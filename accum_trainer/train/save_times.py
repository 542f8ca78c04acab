"""When a checkpoint is due: after so many updates, and after so many minutes.

Clocks differ, and saving is collective. So rank 0 alone looks at its clock, and its request reaches
all with the end of the next window. Knows no files.
"""

from __future__ import annotations

import time

from accum_trainer.accumulator import Accumulator
from accum_trainer.update import Update


class SaveTimes:
    """The saves of one run; made on all processes.

    Args:
        accumulator: carries the request to all processes at the window's end.
        every: updates between saves.
        minutes: time between saves.
    """

    def __init__(self, accumulator: Accumulator, every: int, minutes: float) -> None:
        self._accumulator, self._every, self._seconds = accumulator, every, 60 * minutes
        self._saved_at = time.monotonic()
        self._is_time = False

    def is_due(self, update: Update) -> bool:
        """Whether to save after this window, or after the first that gives an update; on every
        process the same. Called once after each window."""
        self._is_time |= update.save_requested
        if self._is_time or update.step % self._every == 0:
            return True
        passed = time.monotonic() - self._saved_at
        if passed >= self._seconds and self._accumulator.engine.is_main:
            self._accumulator.request_save()
        return False

    def saved(self) -> None:
        """Take note that all have saved."""
        self._saved_at, self._is_time = time.monotonic(), False
