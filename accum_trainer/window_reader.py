"""This rank's part of each window, counted over all ranks before the window begins.

Knows a source, the engine's exchange of a few numbers, and how targets are counted; it trains
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from accum_trainer.batch import Batch, num_samples, num_tokens
from accum_trainer.errors import DataError
from accum_trainer.losses.objective import Objective
from accum_trainer.losses.targets import CountTargets
from accum_trainer.sources.shares import Source, WindowShare


@dataclass(frozen=True)
class CountedWindow:
    """This rank's part of a window, the targets of each of its micro-batches, and what all ranks
    have of the window.

    `table[rank]` holds a rank's targets, micro-batches, samples, tokens, positions and, where it
    was exchanged, fingerprint. `fingerprint` is equal on all ranks that are in the same window; 0
    if each reads its own data.
    """

    part: WindowShare
    targets: list[float]
    table: np.ndarray
    fingerprint: int


class Counter:
    """How a batch's targets are counted: as the user said, or as the model's own loss was proven
    to.

    Attributes:
        given: the user's own function, or None.
        objective: what the model's own loss sums over; None until it is decided.
    """

    def __init__(self, accumulator: Any, given: CountTargets | None) -> None:
        self._accumulator = accumulator
        self.given = given
        self.objective: Objective | None = None

    def decide(self, batches: Sequence[Batch]) -> None:
        """Have the objective found, on the micro-batch with most to prove it on. Collective."""
        # None if no rank had a batch: at the end of an epoch that was resumed.
        self.objective = self._accumulator.losses.decide(batches, self.given)

    def __call__(self, batch: Batch) -> float:
        if self.given is not None:
            return self.given(batch)
        assert self.objective is not None
        self.objective.check_length(batch)
        return self.objective.counting.count(batch)


class WindowReader:
    """This rank's parts of an epoch's windows, counted over all ranks before each begins.

    The counts cost no exchange where the source knows them. Else they travel with the end of the
    window before, where every rank's source reads ahead; else in an exchange of their own. What one
    rank finds wrong, all learn in that exchange.
    """

    def __init__(
        self, engine: Any, source: Source, counter: Counter, epoch: int, consumed: int
    ) -> None:
        self._engine = engine
        self._counter = counter
        self._knows_counts, self._alike = source.knows_counts, source.alike
        self._wants_ahead = source.reads_ahead and engine.world_size > 1
        self._reads_ahead = False  # until all ranks have said so
        self._parts = source.shares(epoch, consumed)
        self._read: _Read | None = None  # of the next window, before the one in hand was finished
        self._table: np.ndarray | None = None  # what all ranks said of it

    def close(self) -> None:
        self._parts.close()

    def next(self) -> CountedWindow | None:
        """The next window; None where no rank has a batch left.

        Raises:
            DataError: the ranks read different data, or another one could not read.
        """
        read, self._read = self._read or self._next_part(), None
        table, self._table = self._table, None
        if self._knows_counts:
            if read.error is not None:
                raise read.error
            return (
                None
                if read.part is None
                else self._counted(read, cast(np.ndarray, read.part.table))
            )
        if table is None:
            table = self._engine.all_gather_floats(read.numbers)
        if read.error is not None:
            raise read.error
        failed = np.flatnonzero(table[:, 1] < 0)
        if len(failed):
            raise DataError(
                f"process {failed[0]} could not read its next window; its own message says why"
            )
        if not table[:, 1].any():
            return None
        idle = np.flatnonzero((table[:, 7] > 0) & (table[:, 1] == 0))
        if len(idle):
            raise DataError(
                f"process {idle[0]} has no batch at all while others have; "
                "give every process at least one batch, or a DataLoader that is dealt to them"
            )
        if not self._alike:
            _check_own_data(table[:, 5])
        elif (table[:, 5] != table[0, 5]).any() or read.part is None:
            raise DataError(
                "the processes read different data: each would train on batches the others also "
                "take or skip. "
                "Seed the sampler's generator alike on all processes; a loader that is already "
                "split by rank is passed as "
                "an iterable of this rank's batches"
            )
        self._reads_ahead = bool(table[:, 6].all())
        return self._counted(read, table)

    def _counted(self, read: _Read, table: np.ndarray) -> CountedWindow:
        part = cast(WindowShare, read.part)
        return CountedWindow(part, read.targets, table, part.fingerprint if self._alike else 0)

    def _next_part(self) -> _Read:
        part, failure = None, None
        try:
            part = next(self._parts, None)
        except Exception as error:
            failure = error
        try:
            if (
                self._counter.objective is None
            ):  # by all ranks together, also by one that could not read
                self._counter.decide(part.batches if part is not None else [])
            if failure is not None:
                raise failure
            if part is None:
                return _Read(None, [], [0.0] * 6 + [float(self._wants_ahead), 0.0])
            targets = [self._counter(batch) for batch in part.batches]
            return _Read(
                part,
                targets,
                [*_numbers(part, targets), float(self._wants_ahead), float(part.filler is None)],
            )
        except Exception as error:
            return _Read(None, [], [0.0, -1.0, *[0.0] * 6], error)

    def read_early(self, most: int) -> None:
        """Have the source read what it may of the next window, up to `most` micro-batches."""
        self._parts.read_early(most)

    def numbers_ahead(self) -> list[float]:
        """The next window's numbers, for the exchange that ends the one in hand; [] where they are
        not read ahead."""
        if not self._reads_ahead:
            return []
        self._read = self._read or self._next_part()
        return self._read.numbers

    def learn_ahead(self, table: np.ndarray) -> None:
        """Take every rank's `numbers_ahead`, shape (ranks, numbers)."""
        self._table = table if table.shape[1] else None


def _check_own_data(fingerprints: np.ndarray) -> None:
    """No two ranks were given the same stream; `fingerprints` of what each has read, 0 where that
    says nothing yet."""
    for number in fingerprints[fingerprints != 0]:
        ranks = np.flatnonzero(fingerprints == number).tolist()
        if len(ranks) > 1:
            raise DataError(
                f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} read the same "
                "batches, which would count as "
                f"{len(ranks)} times as much data. Give each process its own, as in "
                "itertools.islice(stream, rank, None, "
                f"{len(fingerprints)}), or pass a DataLoader, whose batches are dealt to the "
                "processes"
            )


@dataclass(frozen=True)
class _Read:
    """What came of reading: a part, or None at the end of the epoch, or an error to be raised when
    its turn comes.

    `numbers` are what all ranks learn of it: targets, micro-batches (-1 for an error), samples,
    tokens, positions, fingerprint, whether this rank can read ahead, and whether it has nothing to
    run at all.
    """

    part: WindowShare | None
    targets: list[float]
    numbers: list[float]
    error: Exception | None = None


def _numbers(part: WindowShare, targets: list[float]) -> list[float]:
    tokens = [num_tokens(batch) for batch in part.batches]
    return [
        sum(targets),
        len(targets),
        sum(num_samples(batch) for batch in part.batches),
        sum(real for real, _ in tokens),
        sum(positions for _, positions in tokens),
        part.fingerprint,
    ]
