"""The position in each source of data: the epoch, and how much of it is consumed.

Knows sources by identity only. One source has one position, however often `windows()` or
`batches()` is called on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from accum_trainer.noise import GradientNoise

# Lists and tuples allow no weak references: at most this many are kept alive, the last ones used.
MOST_HELD = 16


class Passed(NamedTuple):
    """A checksum of what an epoch has consumed; a resumed run must skip the same.

    Attributes:
        crc: of the indices, or of the content.
        at_once: batches that were read from one seed, on which random content depends; 0 for
            indices. Checksums compare only if it is equal.
    """

    crc: int
    at_once: int = 0


class Workers:
    """Keeps a loader, or None, so that its workers stay alive."""

    loader: Any = None


class Progress:
    """The position in one source after the last finished window.

    Attributes:
        epoch: epochs finished or left.
        consumed: of this epoch, in the source's unit (samples or batches).
        workers: of a loader whose processes outlive an epoch; shared by all positions in a source.
        order: states of the source's own generators at the start of this epoch; None between
            epochs or without such generators.
        loaded_order: the same of a loaded position, until its epoch begins.
        passed: what this epoch has consumed; None if nothing is known about it.
        loaded_passed: the same of a loaded position, until its epoch begins.
        has_compared: a sample of the source was compared between the ranks.
        noise: of the gradient, over the windows that were measured.
    """

    def __init__(self, workers: Workers | None = None) -> None:
        self.epoch = self.consumed = 0
        self.workers = workers or Workers()
        self.order: Any = None
        self.loaded_order: Any = None
        self.passed: Passed | None = None
        self.loaded_passed: Passed | None = None
        self.has_compared = False
        self.noise = GradientNoise()
        self._next: tuple[int, int] | None = None  # start of the next loop, if not here

    def begin(self, goes_on: bool) -> tuple[int, int]:
        """Start a loop; return its epoch and how much of it is consumed.

        A loaded position comes first. Otherwise the next epoch starts, even if the last one was
        left early.

        Args:
            goes_on: the source can be read only once, and continues from here.
        """
        self.epoch, self.consumed = self._next or (self.epoch, self.consumed)
        self._next = None if goes_on else (self.epoch + 1, 0)
        return self.epoch, self.consumed

    def reach(self, epoch: int, consumed: int, passed: Passed | None = None) -> None:
        """Record a finished window or, with `consumed` 0, a finished epoch."""
        self.epoch, self.consumed, self.passed = epoch, consumed, passed
        if not consumed:
            self.order = None

    def take_passed(self) -> Passed | None:
        """What the epoch of a loaded position had consumed; only once."""
        passed, self.loaded_passed = self.loaded_passed, None
        return passed

    def load(
        self, epoch: int, consumed: int, order: Any = None, passed: Passed | None = None
    ) -> None:
        """Start the next loop at this position."""
        self.epoch, self.consumed = epoch, consumed
        self.order = self.loaded_order = order
        self.passed = self.loaded_passed = passed
        self._next = None


class Remembered:
    """The `Progress` of each source, by its identity and the options that change its order."""

    def __init__(self) -> None:
        self._found: dict[int, _Known] = {}
        self._held: dict[int, Any] = {}

    def of(self, source: Any, share: Any) -> Progress:
        """The progress in `source`; a new one for an unknown source.

        Args:
            source: of any type.
            share: hashable; the options that change its order.
        """
        key, found = id(source), self._found
        if key not in found or found[key].source() is not source:
            found[key] = _Known(self._reference(key, source))
        if key in self._held:
            self._held[key] = self._held.pop(key)  # now the most recently used
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
    """The progress of each share of one source, all with the same workers."""

    def __init__(self, source: Callable[[], Any]) -> None:
        self.source = source
        self._workers = Workers()
        self._shares: dict[Any, Progress] = {}

    def of(self, share: Any) -> Progress:
        return self._shares.setdefault(share, Progress(self._workers))
