"""One update: `Window`, its micro-batches on this process, and `Update`, what it did.

From what a source read and all ranks counted (`window_reader`) to micro-batches with their weights;
cut in two when one runs out of memory. The accumulator makes windows and finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accum_trainer.batch import Batch, halve, num_positions, num_samples
from accum_trainer.errors import AccumTrainerError, DataError
from accum_trainer.losses.targets import CountTargets, targets_in
from accum_trainer.window_reader import CountedWindow


@dataclass(frozen=True)
class Update:
    """What one window did.

    Attributes:
        step: optimizer updates made so far, this one counted; a skipped window makes none.
        loss: mean over the window's targets over all ranks, unscaled; nan for an empty window.
        grad_norm: 2-norm of the averaged, unscaled gradient before clipping; nan for an empty
            window.
        num_targets: N, targets of the window over all ranks (the sum of their weights where the
            loss weighs them).
        num_samples: samples of the window over all ranks.
        num_tokens: tokens of `input_ids` over all ranks, padding left out; 0 for batches without
            `input_ids`.
        num_positions: the same with padding: what was computed.
        num_micro_batches: micro-batches of the window over all ranks.
        gradient_accumulation_steps: most micro-batches that one rank ran; K, less in a tail window,
            more after splits.
        skipped: the optimizer did not step.
        reason: why it was skipped: "empty" (no target), "non-finite" (inf or nan in the gradient),
            else "".
        stop_requested: some rank called `request_stop`; all ranks see it at the same update.
        num_splits: how often a micro-batch was cut in two, over all ranks, because it ran out of
            memory, or one as large before it did.
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
    """A micro-batch of a window and what its loss weighs; `auxiliary_weight` is that of a mean over
    micro-batches."""

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
    """One optimizer update's worth of data: iterate it for this process's micro-batches, on this
    process's device.

    A micro-batch that ran out of memory comes again in halves, after a failed backward from the
    window's start on.

    Attributes:
        num_targets: N, over all ranks.
        num_micro_batches: over all ranks, as planned before any was split.
        num_samples, num_tokens, num_positions: over all ranks, as `Update` has them.
    """

    def __init__(
        self,
        accumulator: Any,
        counted: CountedWindow,
        count_targets: CountTargets,
        read_early: Callable[[int], None],
    ) -> None:
        part, counts, table = counted.part, counted.targets, counted.table
        targets, *totals = table[:, :5].sum(axis=0).tolist()
        self.num_targets: float = int(targets) if targets.is_integer() else targets
        self.num_micro_batches, self.num_samples, self.num_tokens, self.num_positions = map(
            int, totals
        )
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
        # Micro-batches without targets go first: the one that exchanges gradients should have some
        # of its own.
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
            raise AccumTrainerError(
                "this window was already iterated; its gradient would be counted twice"
            )
        accumulator = self._accumulator
        while self._started < len(self._run):
            if (
                self._ran_out
            ):  # only now is the stack gone on which it happened, and what it kept alive
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
        """Cut the micro-batch in hand in two, and those to be run that are as large; `__iter__`
        goes on with them.

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
        """Two micro-batches with the gradient of one; DataError where it cannot be cut, or not
        without changing the sum."""
        batches = halve(planned.batch)
        targets = [self._count_targets(batch) if planned.weight else 0 for batch in batches]
        if planned.weight and not math.isclose(sum(targets), planned.num_targets, rel_tol=1e-6):
            raise DataError(
                f"count_targets finds {planned.num_targets} targets in it, and {targets[0]} and "
                f"{targets[1]} in its halves"
            )
        samples = [num_samples(batch) for batch in batches]
        self._num_splits += 1
        halves = [
            Planned(batch, count, planned.weight, planned.auxiliary_weight * size / sum(samples))
            for batch, count, size in zip(batches, targets, samples, strict=True)
        ]
        return sorted(
            halves, key=lambda half: half.num_targets > 0
        )  # as in the window: targets last
