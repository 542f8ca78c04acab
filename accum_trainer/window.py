"""Windows as a loop sees them: their micro-batches, their counts over all ranks, the position after them.

The accumulator makes them and finishes them; here is what happens between, from a source's part to the micro-batch with
its weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from accum_trainer.data.halving import halve, num_positions
from accum_trainer.data.windows import Batch, Part, Source, num_samples, num_tokens
from accum_trainer.epochs import Progress
from accum_trainer.errors import AccumTrainerError, DataError
from accum_trainer.objective import Objective
from accum_trainer.targets import CountTargets, targets_in


@dataclass(frozen=True)
class Update:
    """What one window did.

    Attributes:
        step: optimizer updates made so far, this one counted; a skipped window makes none.
        loss: mean over the window's targets over all ranks, unscaled; nan for an empty window.
        grad_norm: 2-norm of the averaged, unscaled gradient before clipping; nan for an empty window.
        num_targets: N, targets of the window over all ranks (the sum of their weights where the loss weighs them).
        num_samples: samples of the window over all ranks.
        num_tokens: tokens of `input_ids` over all ranks, padding left out; 0 for batches without `input_ids`.
        num_positions: the same with padding: what was computed.
        num_micro_batches: micro-batches of the window over all ranks.
        gradient_accumulation_steps: most micro-batches that one rank ran; K, less in a tail window, more after splits.
        skipped: the optimizer did not step.
        reason: why it was skipped: "empty" (no target), "non-finite" (inf or nan in the gradient), else "".
        stop_requested: some rank called `request_stop`; all ranks see it at the same update.
        num_splits: how often a micro-batch was cut in two, over all ranks, because it ran out of memory, or one as large
            before it did.
    """

    step: int
    loss: float
    grad_norm: float
    num_targets: float
    num_samples: int
    num_tokens: int
    num_positions: int
    num_micro_batches: int
    gradient_accumulation_steps: int
    skipped: bool = False
    reason: str = ""
    stop_requested: bool = False
    num_splits: int = 0


@dataclass(frozen=True)
class Planned:
    """A micro-batch of a window and what its loss weighs; `auxiliary_weight` is that of a mean over micro-batches."""

    batch: Batch
    num_targets: float
    weight: float
    auxiliary_weight: float


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch in hand. `is_first` of a window only once, however often its start is run."""

    planned: Planned
    is_first: bool
    is_last: bool
    targets: dict[str, tuple[Any, int]]  # as the loop was given them


class Window:
    """One optimizer update's worth of data: iterate it for this process's micro-batches, on this process's device.

    A micro-batch that ran out of memory comes again in halves, after a failed backward from the window's start on.

    Attributes:
        num_targets: N, over all ranks.
        num_micro_batches: over all ranks, as planned before any was split.
        num_samples, num_tokens, num_positions: over all ranks, as `Update` has them.
    """

    def __init__(
        self, accumulator: Any, counted: _Counted, count_targets: CountTargets, read_early: Callable[[int], None]
    ) -> None:
        part, counts, table = counted.part, counted.targets, counted.table
        targets, *totals = table[:, :5].sum(axis=0).tolist()
        self.num_targets: float = int(targets) if targets.is_integer() else targets
        self.num_micro_batches, self.num_samples, self.num_tokens, self.num_positions = map(int, totals)
        self._accumulator = accumulator
        self._count_targets = count_targets
        self._read_early, self._num_own = read_early, max(1, len(part.batches))
        self._consumed = part.consumed
        self._fingerprint = counted.fingerprint
        self._started = 0
        self._was_begun = self._ran_out = False
        self._num_splits = 0
        divisor = accumulator.engine.gradient_divisor
        weight = divisor / self.num_targets if self.num_targets > 0 else 0.0
        auxiliary = divisor / max(1, self.num_micro_batches) if weight else 0.0
        # Micro-batches without targets go first: the one that exchanges gradients should have some of its own.
        order = sorted(range(len(counts)), key=lambda i: counts[i] > 0)
        run = [Planned(part.batches[i], counts[i], weight, auxiliary) for i in order]
        wanted = int(table[:, 1].max()) if accumulator.engine.equal_micro_batches else 1
        while len(run) < wanted:
            run.insert(0, Planned(part.filler, 0, 0.0, 0.0))
        self._run = self._cut_to_fit(run)

    def __len__(self) -> int:
        """Micro-batches that this process runs."""
        return len(self._run)

    def __iter__(self) -> Iterator[Batch]:
        if self._was_begun:
            raise AccumTrainerError("this window was already iterated; its gradient would be counted twice")
        accumulator = self._accumulator
        while self._started < len(self._run):
            if self._ran_out:  # only now is the stack gone on which it happened, and what it kept alive
                accumulator.engine.free_memory()
                self._ran_out = False
            planned = self._run[self._started]
            is_first, self._was_begun = not self._was_begun, True
            self._started += 1
            moved = accumulator.engine.to_device(planned.batch)
            is_last = self._started == len(self._run)
            accumulator._microbatch = MicroBatch(planned, is_first, is_last, targets_in(moved))
            yield moved
            accumulator._check_accumulated(self._started)
            self._read_early(self._num_own)

    def _run_again(self, from_start: bool) -> None:
        """Cut the micro-batch in hand in two, and those to be run that are as large; `__iter__` goes on with them.

        Raises:
            DataError: it cannot be cut.
        """
        now = self._started - 1
        # Where a larger one has just been held, it is not the size of this one that is too much.
        largest = max(num_positions(planned.batch) for planned in self._run[: self._started])
        self._run[now : now + 1] = self._halves(self._run[now])
        self._accumulator._too_many_positions = min(self._accumulator._too_many_positions, largest)
        self._started = 0 if from_start else now
        self._run[self._started :] = self._cut_to_fit(self._run[self._started :])
        self._ran_out = True

    def _cut_to_fit(self, run: Sequence[Planned]) -> list[Planned]:
        """The same, those in halves that are as large as what ran out of memory before."""
        fitting: list[Planned] = []
        for planned in run:
            if num_positions(planned.batch) < self._accumulator._too_many_positions:
                fitting.append(planned)
                continue
            try:
                fitting += self._cut_to_fit(self._halves(planned))
            except DataError:  # it is tried as it is, and told if it fails
                fitting.append(planned)
        return fitting

    def _halves(self, planned: Planned) -> list[Planned]:
        """Two micro-batches with the gradient of one; DataError where it cannot be cut, or not without changing the sum."""
        batches = halve(planned.batch)
        targets = [self._count_targets(batch) if planned.weight else 0 for batch in batches]
        if planned.weight and not math.isclose(sum(targets), planned.num_targets, rel_tol=1e-6):
            raise DataError(
                f"count_targets finds {planned.num_targets} targets in it, and {targets[0]} and {targets[1]} in its halves"
            )
        samples = [num_samples(batch) for batch in batches]
        self._num_splits += 1
        halves = [
            Planned(batch, count, planned.weight, planned.auxiliary_weight * size / sum(samples))
            for batch, count, size in zip(batches, targets, samples, strict=True)
        ]
        return sorted(halves, key=lambda half: half.num_targets > 0)  # as in the window: targets last


class Windows:
    """The windows of a source, epoch after epoch: each `for` loop over them is one epoch, the one after the last begun.

    An epoch that was left early is not taken up again, but by `load_state_dict(state_dict())`. What can be read only once, as
    a generator, is read on. All windows of one source share its position, which counts what finished windows used up: it
    can be saved after any update and loaded into a run with another number of processes.
    """

    def __init__(
        self, accumulator: Any, source: Source, count_targets: CountTargets | None, progress: Progress | None = None
    ) -> None:
        self._accumulator = accumulator
        self._source = source
        self._counter = _Counter(accumulator, count_targets)
        self._progress = progress or Progress()
        self._epoch = 0  # of the loop that runs
        self._reader: _Reader | None = None

    @property
    def counts_given(self) -> bool:
        """Whether the user said how targets are counted."""
        return self._counter.given is not None

    @property
    def objective(self) -> Objective | None:
        """What the model's own loss sums over; None before the first window was read."""
        return self._counter.objective

    @property
    def epoch(self) -> int:
        """The epoch of the position: epochs that are finished, or were left for a later one."""
        return self._progress.epoch

    def __len__(self) -> int:
        """Windows in one epoch; TypeError where the source has no length."""
        length = self._source.num_windows()
        if length is None:
            raise TypeError("this source of windows has no length")
        return length

    def num_micro_batches(self) -> int | None:
        """Micro-batches that this process runs in the epoch of the position, if none is split; None where it is not known."""
        found = self._source.micro_batches(self.epoch)
        if found is None:
            return None
        whole, tail = found
        engine = self._accumulator.engine
        of_tail = max(tail, default=0) if engine.equal_micro_batches else max(1, tail[engine.rank]) if tail else 0
        return whole + of_tail

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, and the samples (or batches, of a loader or stream) that its updates consumed; also `order`,
        the states of a loader's own generators where its epoch began."""
        progress = self._progress
        order = self._source.order() if progress.order is None else progress.order
        position = {"epoch": self.epoch, f"{self._source.unit}_consumed": progress.consumed}
        return position if order is None else position | {"order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; the next loop over this source starts there."""
        key = f"{self._source.unit}_consumed"
        if key not in state:
            raise DataError(
                f"the saved position {state} does not count {self._source.unit}, as this source does; "
                "resume with the kind of source that was saved"
            )
        self._progress.load(int(state["epoch"]), int(state[key]), state.get("order"))

    def __iter__(self) -> Iterator[Window]:
        accumulator = self._accumulator
        epoch, consumed = self._progress.begin(self._source.is_read_once)
        found_any = consumed > 0
        reader = _Reader(accumulator.engine, self._source, self._counter, epoch, consumed)
        self._reader, self._epoch = reader, epoch
        with contextlib.closing(reader):
            while (counted := reader.next()) is not None:
                found_any = True
                window = Window(accumulator, counted, self._counter, reader.read_early)
                accumulator._begin(window, self)
                yield window
                accumulator._check_finished()
        if not found_any:
            raise DataError("the source gave no batch in this epoch; is it a generator that is already used up?")
        self._progress.reach(epoch + 1, 0)

    def _finished(self, window: Window) -> None:
        self._progress.reach(self._epoch, window._consumed)


class Batches:
    """This process's micro-batches, one after another: each `for` loop over them is one epoch, as of `Windows`.

    Attributes:
        windows: the windows that they belong to.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __iter__(self) -> Iterator[Batch]:
        for window in self.windows:
            yield from window

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch, if none is split; TypeError where that is not known beforehand."""
        length = self.windows.num_micro_batches()
        if length is None:
            raise TypeError("how many micro-batches this source gives is not known beforehand")
        return length

    @property
    def epoch(self) -> int:
        """As of `Windows`."""
        return self.windows.epoch

    def state_dict(self) -> dict[str, Any]:
        """As of `Windows`."""
        return self.windows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `Windows`."""
        self.windows.load_state_dict(state)


@dataclass(frozen=True)
class _Counted:
    """This rank's part of a window, the targets of each of its micro-batches, and what all ranks have of the window.

    `table[rank]` holds a rank's targets, micro-batches, samples, tokens, positions and, where it was exchanged, fingerprint.
    `fingerprint` is equal on all ranks that are in the same window; 0 if each reads its own data.
    """

    part: Part
    targets: list[float]
    table: np.ndarray
    fingerprint: int


class _Counter:
    """How a batch's targets are counted: as the user said, or as the model's own loss was proven to.

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


class _Reader:
    """This rank's parts of an epoch's windows, counted over all ranks before each begins.

    The counts cost no exchange where the source knows them. Else they travel with the end of the window before, where every
    rank's source reads ahead; else in an exchange of their own. What one rank finds wrong, all learn in that exchange.
    """

    def __init__(self, engine: Any, source: Source, counter: _Counter, epoch: int, consumed: int) -> None:
        self._engine = engine
        self._counter = counter
        self._knows_counts, self._alike = source.knows_counts, source.alike
        self._wants_ahead = source.reads_ahead and engine.world_size > 1
        self._reads_ahead = False  # until all ranks have said so
        self._parts = source.parts(epoch, consumed)
        self._read: _Read | None = None  # of the next window, before the one in hand was finished
        self._table: np.ndarray | None = None  # what all ranks said of it

    def close(self) -> None:
        self._parts.close()

    def next(self) -> _Counted | None:
        """The next window; None where no rank has a batch left.

        Raises:
            DataError: the ranks read different data, or another one could not read.
        """
        read, self._read = self._read or self._next_part(), None
        table, self._table = self._table, None
        if self._knows_counts:
            if read.error is not None:
                raise read.error
            return None if read.part is None else self._counted(read, cast(np.ndarray, read.part.table))
        if table is None:
            table = self._engine.gather(read.numbers)
        if read.error is not None:
            raise read.error
        failed = np.flatnonzero(table[:, 1] < 0)
        if len(failed):
            raise DataError(f"process {failed[0]} could not read its next window; its own message says why")
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
                "the processes read different data: each would train on batches the others also take or skip. "
                "Seed the sampler's generator alike on all processes; a loader that is already split by rank is passed as "
                "an iterable of this rank's batches"
            )
        self._reads_ahead = bool(table[:, 6].all())
        return self._counted(read, table)

    def _counted(self, read: _Read, table: np.ndarray) -> _Counted:
        part = cast(Part, read.part)
        return _Counted(part, read.targets, table, part.fingerprint if self._alike else 0)

    def _next_part(self) -> _Read:
        part, failure = None, None
        try:
            part = next(self._parts, None)
        except Exception as error:
            failure = error
        try:
            if self._counter.objective is None:  # by all ranks together, also by one that could not read
                self._counter.decide(part.batches if part is not None else [])
            if failure is not None:
                raise failure
            if part is None:
                return _Read(None, [], [0.0] * 6 + [float(self._wants_ahead), 0.0])
            targets = [self._counter(batch) for batch in part.batches]
            return _Read(
                part, targets, [*_numbers(part, targets), float(self._wants_ahead), float(part.filler is None)]
            )
        except Exception as error:
            return _Read(None, [], [0.0, -1.0, *[0.0] * 6], error)

    def read_early(self, most: int) -> None:
        """Have the source read what it may of the next window, up to `most` micro-batches."""
        self._parts.read_early(most)

    def numbers_ahead(self) -> list[float]:
        """The next window's numbers, for the exchange that ends the one in hand; [] where they are not read ahead."""
        if not self._reads_ahead:
            return []
        self._read = self._read or self._next_part()
        return self._read.numbers

    def learn_ahead(self, table: np.ndarray) -> None:
        """Take every rank's `numbers_ahead`, shape (ranks, numbers)."""
        self._table = table if table.shape[1] else None


def _check_own_data(fingerprints: np.ndarray) -> None:
    """No two ranks were given the same stream; `fingerprints` of what each has read, 0 where that says nothing yet."""
    for number in fingerprints[fingerprints != 0]:
        ranks = np.flatnonzero(fingerprints == number).tolist()
        if len(ranks) > 1:
            raise DataError(
                f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} read the same batches, which would count as "
                f"{len(ranks)} times as much data. Give each process its own, as in itertools.islice(stream, rank, None, "
                f"{len(fingerprints)}), or pass a DataLoader, whose batches are dealt to the processes"
            )


@dataclass(frozen=True)
class _Read:
    """What came of reading: a part, or None at the end of the epoch, or an error to be raised when its turn comes.

    `numbers` are what all ranks learn of it: targets, micro-batches (-1 for an error), samples, tokens, positions, fingerprint,
    whether this rank can read ahead, and whether it has nothing to run at all.
    """

    part: Part | None
    targets: list[float]
    numbers: list[float]
    error: Exception | None = None


def _numbers(part: Part, targets: list[float]) -> list[float]:
    tokens = [num_tokens(batch) for batch in part.batches]
    return [
        sum(targets),
        len(targets),
        sum(num_samples(batch) for batch in part.batches),
        sum(real for real, _ in tokens),
        sum(positions for _, positions in tokens),
        part.fingerprint,
    ]
