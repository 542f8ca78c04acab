"""This rank's share of each window, counted over all ranks before the window begins.

Knows a source, how targets are counted, and one exchange of a few numbers. It trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from accum_trainer.batch import num_samples, num_tokens
from accum_trainer.errors import DataError
from accum_trainer.exchanged import (
    WindowCounts,
    check_beginnings,
    check_own_data,
    check_read,
    check_same_sample,
)
from accum_trainer.losses.counter import Counter
from accum_trainer.sources.shares import Source, WindowShare


@dataclass(frozen=True)
class CountedWindow:
    """This rank's share of a window, and every rank's counts of it.

    Attributes:
        share: the micro-batches that this rank read.
        targets: of each of them.
        counts: by rank.
        fingerprint: equal on all ranks in the same window; 0 if each reads its own data.
    """

    share: WindowShare
    targets: list[float]
    counts: list[WindowCounts]
    fingerprint: int

    @property
    def totals(self) -> WindowCounts:
        """Sums over ranks."""
        return WindowCounts(*map(sum, zip(*self.counts, strict=True)))

    @property
    def most_micro_batches(self) -> int:
        """Of one rank."""
        return int(max(counts.num_micro_batches for counts in self.counts))


class WindowReader:
    """Reads this rank's shares of an epoch's windows, each counted over all ranks.

    The counts cost no exchange if the source knows them. If every rank's source reads ahead, they
    travel in the exchange that ends the window before; else in a separate one, before the window
    begins. An error on one rank reaches all of them in that exchange; without one it ends its
    process, and the launcher the others.

    Attributes:
        epoch: that is read.
        counter: counts targets.
    """

    def __init__(
        self, engine: Any, source: Source, counter: Counter, epoch: int, consumed: int
    ) -> None:
        self.epoch, self.counter = epoch, counter
        self._engine = engine
        self._knows_counts, self._is_alike = source.knows_counts, source.alike
        self._can_read_ahead = source.reads_ahead and engine.world_size > 1
        self._all_read_ahead = False
        self._shares = source.shares(epoch, consumed)
        self._read: _Read | None = None  # the next window, read before the one in hand has ended
        self._counts: list[WindowCounts] | None = None  # of that window, by rank

    def close(self) -> None:
        self._shares.close()

    def next(self) -> CountedWindow | None:
        """The next window; None if no rank has a batch left.

        Raises:
            DataError: the ranks read different data, or another one could not read.
        """
        read, self._read = self._read or self._read_share(), None
        counts, self._counts = self._counts, None
        if self._knows_counts:
            if read.error is not None:
                raise read.error
            known = None if read.share is None else read.share.counts
            return None if known is None else self._counted(read, known)
        if counts is None:
            table = self._engine.all_gather_floats(read.counts.to_row())
            counts = WindowCounts.from_rows(table)
        if read.error is not None:
            raise read.error
        check_read(counts)
        if not any(one.num_micro_batches for one in counts):
            return None
        fingerprints = [one.fingerprint for one in counts]
        if not self._is_alike:
            check_own_data(fingerprints)
        elif len(set(fingerprints)) > 1 or read.share is None:
            raise DataError(
                "the processes read different data, or samples of other lengths: each would train "
                "on batches the others also take or skip. If it is shuffled, seed the sampler's "
                "generator alike on all processes; if samples are drawn or cut when they are made, "
                "make them alike on all processes; if it is already split by rank, pass the whole "
                "data set or loader, or iter(batches) for batches that are each process's own"
            )
        check_same_sample([one.sample for one in counts])
        self._all_read_ahead = all(one.can_read_ahead for one in counts)
        return self._counted(read, counts)

    def _counted(self, read: _Read, counts: list[WindowCounts]) -> CountedWindow:
        assert read.share is not None
        fingerprint = read.share.fingerprint if self._is_alike else 0
        return CountedWindow(read.share, read.targets, counts, fingerprint)

    def _read_share(self) -> _Read:
        if self.counter.objective is None:
            self._check_all_begin()
        share, failure = None, None
        try:
            share = next(self._shares, None)
        except Exception as error:
            failure = error
        try:
            if self.counter.objective is None:  # by all ranks together, also after a failure
                self.counter.decide(share.batches if share is not None else [])
            if failure is not None:
                raise failure
            if share is None:
                return _Read(None, [], _NOTHING._replace(can_read_ahead=self._can_read_ahead))
            targets = [self.counter(batch) for batch in share.batches]
            return _Read(share, targets, _counts_of(share, targets, self._can_read_ahead))
        except Exception as error:
            return _Read(None, [], _NOTHING._replace(has_failed=True), error)

    def _check_all_begin(self) -> None:
        """Before the collectives of a decision: a rank elsewhere would not join them."""
        if self._engine.world_size > 1:
            row = _NOTHING._replace(is_beginning=True).to_row()
            table = self._engine.all_gather_floats(row)
            check_beginnings(WindowCounts.from_rows(table), together=True)

    def read_early(self, most: int) -> None:
        """Let the source read ahead, up to `most` micro-batches of the next window."""
        self._shares.read_early(most)

    def counts_ahead(self) -> list[float]:
        """The next window's counts, for the exchange that ends the one in hand; [] if some rank
        cannot read ahead."""
        if not self._all_read_ahead:
            return []
        self._read = self._read or self._read_share()
        return self._read.counts.to_row()

    def learn_ahead(self, table: np.ndarray) -> None:
        """Take every rank's `counts_ahead`, shape (ranks, columns)."""
        self._counts = WindowCounts.from_rows(table) if table.shape[1] else None


@dataclass(frozen=True)
class _Read:
    """The result of one read: a share, or None at the end of the epoch, or an error that is raised
    when the window is due."""

    share: WindowShare | None
    targets: list[float]
    counts: WindowCounts
    error: Exception | None = None


_NOTHING = WindowCounts(0, 0, 0, 0, 0)


def _counts_of(share: WindowShare, targets: list[float], can_read_ahead: bool) -> WindowCounts:
    tokens = [num_tokens(batch) for batch in share.batches]
    return WindowCounts(
        num_targets=sum(targets),
        num_micro_batches=len(targets),
        num_samples=sum(num_samples(batch) for batch in share.batches),
        num_tokens=sum(real for real, _ in tokens),
        num_positions=sum(positions for _, positions in tokens),
        fingerprint=share.fingerprint,
        can_read_ahead=can_read_ahead,
        has_nothing=share.filler is None,
        sample=share.sample,
        is_random=share.is_random,
    )
