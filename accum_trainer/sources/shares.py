"""WindowShares: what a source of windows gives to one rank, and how batches become parts.

Knows nothing of data sets, of loaders' options, or of the other ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from accum_trainer.batch import Batch
from accum_trainer.sources.drawing import drawing_from


@dataclass(frozen=True)
class WindowShare:
    """This rank's part of one window.

    Attributes:
        batches: this rank's micro-batches; may be none.
        filler: a batch to run with weight 0 where an exchange needs this rank and it has none of
            its own.
        consumed: what of the epoch is used up once this window is done, in the source's unit.
        fingerprint: equal on all ranks that cut the same window; where ranks read their own data
            it must not be equal, but 0 says nothing.
        table: targets, micro-batches, samples, tokens and positions of each rank, shape (ranks,
            5), where the source knows them without asking; then nothing has to be exchanged before
            the window begins.
    """

    batches: list[Batch]
    filler: Batch | None
    consumed: int
    fingerprint: int = 0
    table: np.ndarray | None = None


class Reading(Iterator[Batch]):
    """The batches of `begin()`, which is called when the first is asked for; some may be read
    before they are due."""

    def __init__(self, begin: Callable[[], Iterator[Batch]]) -> None:
        self._begin = begin
        self._batches: Iterator[Batch] | None = None
        self._early: deque[Batch] = deque()
        self._failure: Exception | None = None

    def __next__(self) -> Batch:
        if self._early:
            return self._early.popleft()
        if self._failure is not None:
            raise self._failure
        if self._batches is None:
            self._batches = self._begin()
        return next(self._batches)

    def read_early(self, most: int) -> None:
        """Read one batch, unless `most` are there. What fails, or that nothing is left, is told in
        its turn."""
        if self._batches is None or self._failure is not None or len(self._early) >= most:
            return
        try:
            self._early.append(next(self._batches))
        except Exception as failure:  # StopIteration too
            self._failure = failure

    def close(self) -> None:
        """Let go of what was begun."""
        self._batches, self._begin = iter(()), lambda: iter(())
        self._early.clear()


class WindowShares(Iterator[WindowShare]):
    """This rank's parts of the windows of an epoch, one per `next`.

    Args:
        reading: what they are made of, where its batches may be read early.
        times: batches of `reading` that make one micro-batch of this rank.
    """

    def __init__(
        self,
        parts: Generator[WindowShare, None, None],
        reading: Reading | None = None,
        times: int = 1,
    ) -> None:
        self._parts, self._reading, self._times = parts, reading, times

    def __next__(self) -> WindowShare:
        return next(self._parts)

    def read_early(self, most: int) -> None:
        """Read what one micro-batch of the next window takes, unless `most` micro-batches of it
        are there.

        Workers go on while this process trains only if somebody takes what they made: a window's
        batches asked for all at once would be waited for.
        """
        if self._reading is not None:
            for _ in range(self._times):
                self._reading.read_early(most * self._times)

    def close(self) -> None:
        self._parts.close()
        if self._reading is not None:
            self._reading.close()


class Source(Protocol):
    """Where windows come from.

    Attributes:
        unit: what `consumed` counts: "samples" or "batches".
        knows_counts: each part has a `table`, so that nothing has to be exchanged.
        reads_ahead: the next part is made elsewhere and draws no random numbers here, so that it
            may be asked for before the update of the one in hand.
        alike: all ranks read the same and take their share of it; otherwise each reads its own.
        is_read_once: it cannot be begun anew.
    """

    unit: str
    knows_counts: bool
    reads_ahead: bool
    alike: bool
    is_read_once: bool

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        """This rank's parts of the windows of `epoch`, from where `consumed` units are used up."""

    def num_windows(self) -> int | None:
        """Windows in one epoch, or None where the source has no length."""

    def order(self) -> Any:
        """What the order of an epoch that begins now would be drawn from besides (seed, epoch):
        for a saved position; or None."""

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        """(whole windows of `epoch`, each rank's micro-batches in one, each rank's in the tail
        window); [] where there is none; None where that is not known beforehand."""


@dataclass(frozen=True)
class Announced:
    """A window that a batch sampler has begun: workers load ahead of training, so it is noted when
    it is sampled."""

    num_batches: int
    consumed: int
    fingerprint: int
    table: np.ndarray | None = None


def read_shares(
    reading: Iterator[Batch],
    announced: deque[Announced],
    begin: int,
    seed: Callable[[int], int] | None,
) -> Generator[WindowShare, None, None]:
    """Group what a loader yields into parts, as its batch sampler announced them.

    Args:
        begin: what of the epoch is used up.
        seed: of what is read once so much is used up, where it is read in this process; None where
            workers read.
    """
    while True:
        if seed is None:
            part = _part(reading, announced)
        else:
            with drawing_from(seed(begin)):
                part = _part(reading, announced)
        if part is None:
            return
        begin = part.consumed
        yield part


def _part(batches: Iterator[Batch], announced: deque[Announced]) -> WindowShare | None:
    """The next part, or None at the end."""
    first = list(islice(batches, 1))
    if not first:
        return None
    window = announced.popleft()
    mine = first + list(islice(batches, window.num_batches - 1)) if window.num_batches else []
    return WindowShare(mine, (mine or first)[-1], window.consumed, window.fingerprint, window.table)
