"""Whether all processes left the caller's loop at the same record, asked without a collective.

A generator is closed alike when its caller breaks out and when its caller raises; Python does not
tell it which. Saving is collective, so a process whose caller raised must not begin it alone: the
others are in the next window, and all would wait for ever. Each process therefore posts its place
in the store that the processes met at. Knows no training and no files.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

from accum_trainer.engine.ranks import Ranks

# Loops of this process so far. Every process runs the same loops, so their keys agree.
_LOOPS = itertools.count()
_ON, _LEFT = "on", "left"
# After this long, a log line names the process that is waited for.
_QUIET_WAIT_SEC = 30.0

logger = logging.getLogger(__name__)


class LoopPlaces:
    """Where each process is in one loop over records; made on all processes before the first.

    Args:
        ranks: this process among the others.
        record: the number of records before the loop.
    """

    def __init__(self, ranks: Ranks, record: int) -> None:
        self._ranks = ranks
        self._key = f"accum_trainer/loop-{next(_LOOPS)}"
        self.goes_on_after(record)

    def goes_on_after(self, record: int) -> None:
        """Post that this process takes the next window, or ends the loop as planned.

        Raises:
            StoreLostError: there is nobody to tell.
        """
        self._ranks.post(self._key, f"{record} {_ON}")

    def process_that_did_not_leave(
        self, record: int, sleep: Callable[[float], None] = time.sleep
    ) -> int | None:
        """Post that this process left its loop at `record`; the first rank that did not, or None.

        A process that has not come back from its caller since the record before is waited for: it
        may be slow to break out.

        Raises:
            StoreLostError: it cannot be known.
        """
        self._ranks.post(self._key, f"{record} {_LEFT}")
        pause, begun, was_said = 0.01, time.monotonic(), False
        while True:
            places = [place.split() for place in self._ranks.posted(self._key)]
            for rank, (at, state) in enumerate(places):
                if (state == _ON and int(at) >= record) or (state == _LEFT and int(at) != record):
                    return rank
            if all(state == _LEFT for _, state in places):
                return None
            if not was_said and time.monotonic() - begun > _QUIET_WAIT_SEC:
                was_said = True
                waited_for = [rank for rank, (_, state) in enumerate(places) if state == _ON]
                logger.warning(
                    "this process left the loop over updates; waiting for process %d to leave it",
                    waited_for[0],
                )
            sleep(pause)
            pause = min(2 * pause, 1.0)
