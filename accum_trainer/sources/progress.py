"""Where training stands in each source of data: the epoch, and what of it is used up.

Knows sources by their identity only. One source has one position, however often `windows()` or
`batches()` is called on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

# Lists and tuples cannot be referenced weakly: so many of them are kept alive, the last ones used.
MOST_HELD = 16


class Workers:
    """Keeps a loader, or None, for its living workers."""

    loader: Any = None


class Progress:
    """The position in one source; it counts what finished windows used up.

    Attributes:
        epoch, consumed: after the last finished window; consumed in the source's unit.
        workers: what reads the source where its processes live through epochs; the same for all
            positions in one source.
        order: what the order of the epoch that was begun is drawn from, if it is the source's own;
            None between epochs.
        loaded_order: the same of a loaded position, until its epoch begins.
    """

    def __init__(self, workers: Workers | None = None) -> None:
        self.epoch = self.consumed = 0
        self.workers = workers or Workers()
        self.order: Any = None
        self.loaded_order: Any = None
        self._next: tuple[int, int] | None = None  # where the next loop begins, if not here

    def begin(self, goes_on: bool) -> tuple[int, int]:
        """Start a loop; return its epoch and what of it is used up.

        That is what `load` said, else the epoch after the one last begun, from its start, also
        where that was left early. `goes_on` is for what can be read only once: it is read on from
        where it stands.
        """
        self.epoch, self.consumed = self._next or (self.epoch, self.consumed)
        self._next = None if goes_on else (self.epoch + 1, 0)
        return self.epoch, self.consumed

    def reach(self, epoch: int, consumed: int) -> None:
        """A window was finished, or with `consumed` 0 the epoch before."""
        self.epoch, self.consumed = epoch, consumed
        if not consumed:
            self.order = None

    def load(self, epoch: int, consumed: int, order: Any = None) -> None:
        """Have the next loop begin there."""
        self.epoch, self.consumed = epoch, consumed
        self.order = self.loaded_order = order
        self._next = None


class Remembered:
    """The `Progress` of each source, by the source's identity and by `share`: what else decides
    its order."""

    def __init__(self) -> None:
        self._found: dict[int, _Known] = {}
        self._held: dict[int, Any] = {}

    def of(self, source: Any, share: Any) -> Progress:
        """The progress in `source`; a new one where it was never seen."""
        key, found = id(source), self._found
        if key not in found or found[key].source() is not source:
            found[key] = _Known(self._reference(key, source))
        if key in self._held:
            self._held[key] = self._held.pop(key)  # now the last used
        while len(self._held) > MOST_HELD:
            oldest = next(iter(self._held))
            del self._held[oldest], found[oldest]
        return found[key].of(share)

    def _reference(self, key: int, source: Any) -> Callable[[], Any]:
        found = self._found
        try:
            return weakref.ref(source, lambda _: found.pop(key, None))
        except TypeError:
            self._held[key] = source
            return lambda: source


class _Known:
    """What is known of one source: the progress of each share, all with the same workers."""

    def __init__(self, source: Callable[[], Any]) -> None:
        self.source = source
        self._workers = Workers()
        self._shares: dict[Any, Progress] = {}

    def of(self, share: Any) -> Progress:
        return self._shares.setdefault(share, Progress(self._workers))
