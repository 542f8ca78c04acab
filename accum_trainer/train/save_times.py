"""When a checkpoint is due: after so many updates, and after so many minutes.

Clocks differ, and saving is collective. So rank 0 alone looks at its clock, and announces one
window ahead after which one all save (or the first after it that gives an update). Knows no files.
"""

from __future__ import annotations

import itertools
import time

from accum_trainer.engine.ranks import Ranks

# Of this process so far. Every process makes the same ones, so their keys agree.
_MADE = itertools.count()
# Of the minutes: from then on the others look for an announcement. Clocks run about alike.
_LOOKS_FROM = 0.5


class SaveTimes:
    """The saves of one run; made on all processes.

    Args:
        ranks: this process among the others.
        every: updates between saves.
        minutes: time between saves.
    """

    def __init__(self, ranks: Ranks, every: int, minutes: float) -> None:
        self._ranks, self._every, self._seconds = ranks, every, 60 * minutes
        self._key = f"accum_trainer/saves-{next(_MADE)}"
        self._saves = 0
        self._saved_at = time.monotonic()
        self._announced: int | None = None  # rank 0: the window from which on all save

    def is_due(self, step: int, window: int) -> bool:
        """Whether to save after this window, which ends with update `step`; on every process the
        same. Called once after each window.

        Args:
            window: windows of the run so far, those without an update included.
        """
        return step % self._every == 0 or self._is_announced(window)

    def saved(self) -> None:
        """Take note that all have saved."""
        self._saves += 1
        self._saved_at, self._announced = time.monotonic(), None

    def _is_announced(self, window: int) -> bool:
        passed = time.monotonic() - self._saved_at
        if self._ranks.world_size == 1:
            return passed >= self._seconds
        key = f"{self._key}/{self._saves}"
        if self._ranks.is_main:
            if self._announced is None and passed >= self._seconds:
                # All hear of it before they end the next window, which they end together.
                self._announced = window + 1
                self._ranks.post_once(key, str(window + 1))
                return False
            return self._announced is not None and self._announced <= window
        if passed < _LOOKS_FROM * self._seconds:
            return False
        announced = self._ranks.posted_once(key)
        return announced is not None and int(announced) <= window
