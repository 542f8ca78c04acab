"""`Source`, the contract of sources, and `WindowShares`, one rank's shares of an epoch's windows.

Knows no data set, no loader's options and no other rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from accum_trainer.batch import Batch
from accum_trainer.exchanged import WindowCounts
from accum_trainer.sources.drawing import drawing_from
from accum_trainer.sources.progress import Passed


@dataclass(frozen=True)
class WindowShare:
    """This rank's part of one window.

    Attributes:
        batches: this rank's micro-batches; may be none.
        filler: a batch to run with weight 0 if a collective needs this rank and it has no batch.
        consumed: of the epoch once this window is done, in the source's unit.
        fingerprint: must be equal on all ranks if they share the data, and unequal if each reads
            its own; 0 means nothing.
        counts: of each rank; None if the source does not know them. With them, no communication is
            needed before the window.
        sample: digest of the content of one sample, the same index on all ranks; 0 means nothing.
        passed: what this epoch has consumed once this window is done; see `Passed`.
        is_random: each micro-batch is a random sample of the data, and the noise of the gradient
            is to be measured; the same on all ranks.
    """

    batches: list[Batch]
    filler: Batch | None
    consumed: int
    fingerprint: int = 0
    counts: list[WindowCounts] | None = None
    sample: int = 0
    passed: Passed | None = None
    is_random: bool = False


class Reading(Iterator[Batch]):
    """The batches of `begin()`, some of them read before they are needed.

    `begin` is called when the first batch is read.
    """

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
        """Read one batch unless `most` are queued. An error or the end is raised in its turn."""
        if self._batches is None or self._failure is not None or len(self._early) >= most:
            return
        try:
            self._early.append(next(self._batches))
        except Exception as failure:  # StopIteration too
            self._failure = failure

    def close(self) -> None:
        """Drop the iterator and the queued batches."""
        self._batches, self._begin = iter(()), lambda: iter(())
        self._early.clear()


class WindowShares(Iterator[WindowShare]):
    """This rank's shares of the windows of an epoch, one per `next`.

    Args:
        shares: made one at a time.
        reading: the batches that they are made of, if these may be read early.
        times: batches of `reading` per micro-batch of this rank.
    """

    def __init__(
        self,
        shares: Generator[WindowShare, None, None],
        reading: Reading | None = None,
        times: int = 1,
    ) -> None:
        self._shares, self._reading, self._times = shares, reading, times

    def __next__(self) -> WindowShare:
        return next(self._shares)

    def read_early(self, most: int) -> None:
        """Read one micro-batch of the next window, unless `most` micro-batches are queued.

        Workers only continue if their batches are taken. Taking a whole window at once would wait
        for all of its batches.
        """
        if self._reading is not None:
            for _ in range(self._times):
                self._reading.read_early(most * self._times)

    def close(self) -> None:
        """Stop reading."""
        self._shares.close()
        if self._reading is not None:
            self._reading.close()


class Source(Protocol):
    """A source of windows.

    Attributes:
        unit: of `consumed`: "samples" or "batches".
        knows_counts: each share has the `counts` of all ranks, so no communication is needed.
        reads_ahead: the next share is made in another process or thread and draws no random numbers
            here, so it may be taken before the current update.
        alike: all ranks read the same data and take their shares; otherwise each reads its own.
        is_read_once: it cannot be restarted.
    """

    unit: str
    knows_counts: bool
    reads_ahead: bool
    alike: bool
    is_read_once: bool

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        """This rank's shares of the windows of `epoch`, after the first `consumed` units."""

    def num_windows(self) -> int | None:
        """Windows in one epoch; None if the source has no length."""

    def order(self) -> Any:
        """States of the generators that an epoch's order is drawn from besides (seed, epoch).

        Part of a saved position; None if there are none.
        """

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        """Micro-batches of `epoch`, or None if they are not known in advance.

        Returns:
            (number of whole windows, micro-batches of each rank in one of them, micro-batches of
            each rank in the tail window); [] for a window that does not exist.
        """


@dataclass(frozen=True)
class Announced:
    """A window that a batch sampler has started.

    Workers load ahead of training, so each window is recorded when it is sampled. The fields become
    those of its `WindowShare`; `num_batches` are this rank's.
    """

    num_batches: int
    consumed: int
    fingerprint: int
    counts: list[WindowCounts] | None = None
    sample: int = 0
    passed: Passed | None = None
    is_random: bool = False


def read_shares(
    reading: Iterator[Batch],
    announced: deque[Announced],
    begin: int,
    seed: Callable[[int], int] | None,
) -> Generator[WindowShare, None, None]:
    """Group the batches of a loader into the windows that its batch sampler announced.

    Args:
        reading: the loader's batches.
        announced: windows, appended by the batch sampler.
        begin: units of the epoch that are already consumed.
        seed: from the consumed units, the seed for reading the next window in this process; None
            if workers read.
    """
    while True:
        if seed is None:
            share = _next_share(reading, announced)
        else:
            with drawing_from(seed(begin)):
                share = _next_share(reading, announced)
        if share is None:
            return
        begin = share.consumed
        yield share


def _next_share(batches: Iterator[Batch], announced: deque[Announced]) -> WindowShare | None:
    """The next window's share; None at the end."""
    first = list(islice(batches, 1))
    if not first:
        return None
    window = announced.popleft()
    mine = first + list(islice(batches, window.num_batches - 1)) if window.num_batches else []
    return WindowShare(
        mine,
        (mine or first)[-1],
        window.consumed,
        window.fingerprint,
        window.counts,
        window.sample,
        window.passed,
        window.is_random,
    )
