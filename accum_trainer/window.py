"""`Window`: all the state of one update, from its micro-batches to the sum of their losses.

A source read this rank's share, and the ranks counted it (`window_reader`). Here every micro-batch
gets its weight. The gradient of a window is g = sum over micro-batches of grad(L) / N, where L is a
micro-batch's loss, summed over its targets, and N the number of targets of the window over all
ranks and micro-batches. The engine itself divides the sum of all backwards by `gradient_divisor`,
so

    weight = gradient_divisor / N

makes the result exact. Nothing else in this package divides a loss.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from accum_trainer.batch import Batch, halve, num_positions, num_samples
from accum_trainer.errors import AccumTrainerError, DataError
from accum_trainer.losses.targets import note_move, targets_in
from accum_trainer.noise import WindowNorms
from accum_trainer.oom import OomRecovery
from accum_trainer.sources.progress import Progress
from accum_trainer.window_reader import CountedWindow, WindowReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A micro-batch and its weights.

    Attributes:
        num_targets: targets in it.
        weight: factor of its loss, summed over targets; 0 for one that is run for the others' sake.
        auxiliary_weight: factor of a term that is a mean over micro-batches.
    """

    batch: Batch
    num_targets: float
    weight: float
    auxiliary_weight: float


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch in hand.

    Attributes:
        planned: its batch and weights.
        is_first: of the window; True only on the first attempt, restarts do not set it.
        is_last: its backward ends the window on this rank.
        targets: its target tensors as the loop got them, each with its version.
    """

    planned: Planned
    is_first: bool
    is_last: bool
    targets: dict[str, tuple[Any, int]]


class Position(NamedTuple):
    """Identifies a window: equal on all ranks, unless each reads its own data (fingerprint 0)."""

    num_updates: int
    epoch: int
    consumed: int
    fingerprint: int

    def checksum(self) -> int:
        """32 bits that tell two positions apart; 0 if ranks have nothing to compare."""
        return zlib.crc32(repr(tuple(self)).encode()) if self.fingerprint else 0


class Window:
    """One update's worth of data: iterate it for this process's micro-batches, on its device.

    A micro-batch that ran out of memory comes again in halves; after a failed backward the window
    starts anew.

    Attributes:
        num_targets: N, over all ranks.
        num_micro_batches: over all ranks, as planned before any was split.
        num_samples, num_tokens, num_positions: over all ranks, as in `Update`.
        num_splits: micro-batches that this rank cut in two.
        loss_sum: losses so far on this rank, summed over targets; float64 if the device has it.
        position: identifies the window.
        micro_batch: the one in hand; None before the first and after a failed one.
        is_running: the loop is inside `accumulate`.
        is_finished: the optimizer has stepped or skipped.
        was_left: the loop broke out before the window was finished.
        reader: read and counted this window, and counts the next.
        norms: of the gradients of its micro-batches, if its noise is measured.
    """

    def __init__(
        self,
        counted: CountedWindow,
        reader: WindowReader,
        progress: Progress,
        engine: Any,
        oom: OomRecovery,
        num_updates: int,
    ) -> None:
        totals = counted.totals
        targets = totals.num_targets
        self.num_targets: float = int(targets) if float(targets).is_integer() else targets
        self.num_micro_batches = int(totals.num_micro_batches)
        self.num_samples = int(totals.num_samples)
        self.num_tokens = int(totals.num_tokens)
        self.num_positions = int(totals.num_positions)
        self.reader = reader
        self.position = Position(
            num_updates, reader.epoch, counted.share.consumed, counted.fingerprint
        )
        self._passed = counted.share.passed
        self.num_splits = 0
        self.loss_sum: torch.Tensor | float = 0.0
        self.micro_batch: MicroBatch | None = None
        self.is_running = self.is_finished = self.was_left = False
        self._engine, self._oom, self._progress = engine, oom, progress
        self._started = self._accumulated = 0
        self._was_begun = self._ran_out = False
        self._num_to_read_early = max(1, len(counted.share.batches))
        self._planned = self._cut_to_fit(self._weighted(counted))
        measured = self._planned if counted.share.is_random else []
        self.norms = WindowNorms(progress.noise, measured, engine.gradient_divisor)

    def _weighted(self, counted: CountedWindow) -> list[Planned]:
        divisor = self._engine.gradient_divisor
        weight = divisor / self.num_targets if self.num_targets > 0 else 0.0
        auxiliary = divisor / max(1, self.num_micro_batches) if weight else 0.0
        # Micro-batches without targets go first: the last one reduces gradients and should have
        # some.
        pairs = sorted(
            zip(counted.share.batches, counted.targets, strict=True), key=lambda pair: pair[1] > 0
        )
        planned = [Planned(batch, count, weight, auxiliary) for batch, count in pairs]
        # A rank that is short runs its filler with weight 0, because the others wait for it.
        most = counted.most_micro_batches if self._engine.equal_micro_batches else 1
        return [Planned(counted.share.filler, 0, 0.0, 0.0)] * (most - len(planned)) + planned

    @property
    def is_complete(self) -> bool:
        """Every micro-batch went through `accumulate` and `backward`."""
        return self._accumulated == len(self)

    @property
    def has_run_backward(self) -> bool:
        """A backward of the micro-batch in hand began."""
        return self._accumulated == self._started

    def __len__(self) -> int:
        """Micro-batches that this process runs."""
        return len(self._planned)

    def __iter__(self) -> Iterator[Batch]:
        if self._was_begun:
            raise AccumTrainerError(
                "this window was already iterated; its gradient would be counted twice"
            )
        while self._started < len(self):
            if self._ran_out:  # the failed frame and its tensors are only now released
                self._engine.free_memory()
                self._ran_out = False
            planned = self._planned[self._started]
            is_first, self._was_begun = not self._was_begun, True
            self._started += 1
            batch = self._engine.to_device(planned.batch)
            note_move(planned.batch, batch)
            is_last = self._started == len(self)
            self.micro_batch = MicroBatch(planned, is_first, is_last, targets_in(batch))
            yield batch
            self.check_accumulated(self._started)
            self.reader.read_early(self._num_to_read_early)

    def weigh(
        self,
        loss: torch.Tensor,
        is_mean: bool,
        auxiliary: torch.Tensor | None,
        is_zero: bool = False,
    ) -> torch.Tensor | None:
        """The term whose gradient this micro-batch adds to the window; None if it adds nothing.

        Args:
            loss: shape (); the sum over the micro-batch's targets, or their mean.
            auxiliary: shape (); a mean over micro-batches, or None.
            is_zero: if the micro-batch has no targets, its loss is known to be 0; else it is
                looked at, which waits for the device.
        """
        assert self.micro_batch is not None
        planned = self.micro_batch.planned
        terms = planned.num_targets if is_mean else 1
        self._accumulated = self._started
        if planned.weight and terms:
            seen = loss.detach()
            seen = seen if seen.device.type == "mps" else seen.double()  # mps has no float64
            self.loss_sum = self.loss_sum + seen * terms
        elif auxiliary is None and not (
            self.micro_batch.is_last or self._engine.equal_micro_batches
        ):
            return None  # a mean over no target is nan, and must not touch the gradient
        elif self.num_targets > 0 and not (
            is_zero or bool(loss.isfinite())
        ):  # but here a backward is due
            loss = self._zero(loss, auxiliary)
        total = loss * (planned.weight * terms)
        return total if auxiliary is None else total + auxiliary * planned.auxiliary_weight

    def _zero(self, loss: torch.Tensor, auxiliary: torch.Tensor | None) -> torch.Tensor:
        if auxiliary is None:
            raise AccumTrainerError(
                f"the loss of a micro-batch without targets is {loss.item()}, and the other "
                "processes wait for its backward; make it 0, as with total / count.clamp(min=1)"
            )
        return torch.zeros_like(auxiliary)

    def check_accumulated(self, num_due: int | None = None) -> None:
        """Raise an AccumTrainerError unless every micro-batch due so far went through
        `accumulate` and `backward`; by default all of the window are due."""
        due = len(self) if num_due is None else num_due
        if self._accumulated != due:
            raise AccumTrainerError(
                f"{due} of this window's micro-batches are due, but {self._accumulated} went "
                "through accumulate() and backward(); a micro-batch that is left out would be "
                "missing from the gradient"
            )

    def check_finished(self) -> None:
        """Raise an AccumTrainerError if no optimizer used the gradient."""
        if not self.is_finished:
            raise AccumTrainerError(
                "the window's gradient was not used: call acc.step(optimizer) after the window's "
                "micro-batches, or optimizer.step() after each micro-batch with the optimizer that "
                "acc.prepare() returned"
            )

    def leave(self) -> None:
        """The loop broke out: what was accumulated is discarded when the next window begins."""
        self.was_left = not self.is_finished
        if self.was_left and self._was_begun:
            logger.warning(
                "a loop was left after %d of a window's %d micro-batches: their gradient belongs "
                "to no update and is discarded",
                self._accumulated,
                len(self),
            )

    def finish(self) -> None:
        """The optimizer has stepped or skipped: the position moves past this window."""
        self.is_finished = True
        self._progress.reach(self.position.epoch, self.position.consumed, self._passed)

    # --- out of memory ---

    def split(self, from_start: bool) -> None:
        """Cut the micro-batch in hand in two, and later ones of its size; `__iter__` goes on there.

        Args:
            from_start: go on with the window's first micro-batch, the gradient so far is void.

        Raises:
            DataError: it cannot be cut.
        """
        now = self._started - 1
        # A larger one that was just held proves that this one's size is not too much.
        largest = max(num_positions(p.batch) for p in self._planned[: self._started])
        self._planned[now : now + 1] = self._halves(self._planned[now])
        if not self.norms.give_up():
            self._oom.remember(largest)
        self._started = 0 if from_start else now
        self._planned[self._started :] = self._cut_to_fit(self._planned[self._started :])
        self._accumulated = self._started
        self.micro_batch = None
        self._ran_out = True
        if from_start:
            self.loss_sum = 0.0

    def _cut_to_fit(self, planned: Sequence[Planned]) -> list[Planned]:
        fitting: list[Planned] = []
        for one in planned:
            if self._oom.fits(one.batch):
                fitting.append(one)
                continue
            try:
                fitting += self._cut_to_fit(self._halves(one))
            except DataError:  # it is tried whole, and the error is raised if it fails
                fitting.append(one)
        return fitting

    def _halves(self, planned: Planned) -> list[Planned]:
        """Two micro-batches with the gradient of one; DataError if its targets do not add up."""
        batches = halve(planned.batch)
        targets = [self.reader.counter(batch) if planned.weight else 0 for batch in batches]
        if planned.weight and not math.isclose(sum(targets), planned.num_targets, rel_tol=1e-6):
            raise DataError(
                f"count_targets finds {planned.num_targets} targets in it, and {targets[0]} and "
                f"{targets[1]} in its halves"
            )
        samples = [num_samples(batch) for batch in batches]
        self.num_splits += 1
        halves = [
            Planned(batch, count, planned.weight, planned.auxiliary_weight * size / sum(samples))
            for batch, count, size in zip(batches, targets, samples, strict=True)
        ]
        return sorted(halves, key=lambda half: half.num_targets > 0)  # the one with targets last
