"""Windows as a loop sees them: their micro-batches, their counts over all ranks, the position after them.

The accumulator makes them and finishes them; here is what happens between, from a source's part to the micro-batch with
its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accum_trainer.data.windows import Batch, Part, Source, num_samples, num_tokens
from accum_trainer.errors import AccumTrainerError, DataError

# Number of terms a batch's loss sums over; the sum of their weights where the loss weighs its terms.
CountTargets = Callable[[Batch], float]


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
        gradient_accumulation_steps: most micro-batches that one rank ran; K, or less in a tail window.
        skipped: the optimizer did not step.
        reason: why it was skipped: "empty" (no target), "non-finite" (inf or nan in the gradient), else "".
        stop_requested: some rank called `request_stop`; all ranks see it at the same update.
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


@dataclass(frozen=True)
class MicroBatch:
    num_targets: float
    weight: float
    auxiliary_weight: float
    is_first: bool
    is_last: bool


class Window:
    """One optimizer update's worth of data: iterate it for this process's micro-batches, on this process's device.

    Attributes:
        num_targets: N, over all ranks.
        num_micro_batches, num_samples, num_tokens, num_positions: over all ranks, as `Update` has them.
    """

    def __init__(self, accumulator: Any, part: Part, counts: list[float], table: np.ndarray) -> None:
        """`table[rank]` holds each rank's targets, micro-batches, samples, tokens and positions."""
        targets, *totals = table.sum(axis=0).tolist()
        self.num_targets: float = int(targets) if targets.is_integer() else targets
        self.num_micro_batches, self.num_samples, self.num_tokens, self.num_positions = map(int, totals)
        most_on_a_rank = int(table[:, 1].max())
        self._accumulator = accumulator
        self._most_on_a_rank = most_on_a_rank
        self._consumed = part.consumed
        self._started = 0
        self._finished = False
        weight = accumulator.engine.gradient_divisor / self.num_targets if self.num_targets > 0 else 0.0
        # Micro-batches without targets go first: the one that exchanges gradients should have some of its own.
        order = sorted(range(len(counts)), key=lambda i: counts[i] > 0)
        run: list[tuple[Batch, float, float]] = [(part.batches[i], counts[i], weight) for i in order]
        wanted = most_on_a_rank if accumulator.engine.equal_micro_batches else 1
        while len(run) < wanted:
            if part.filler is None:
                raise DataError(
                    f"process {accumulator.engine.rank} has no batch at all while others have; "
                    "give every process at least one batch, or a DataLoader that is dealt to them"
                )
            run.insert(0, (part.filler, 0, 0.0))
        self._run = run

    def __len__(self) -> int:
        """Micro-batches that this process runs."""
        return len(self._run)

    def __iter__(self) -> Iterator[Batch]:
        if self._started:
            raise AccumTrainerError("this window was already iterated; its gradient would be counted twice")
        auxiliary = self._accumulator.engine.gradient_divisor / max(1, self.num_micro_batches)
        for index, (batch, targets, weight) in enumerate(self._run):
            self._accumulator._check_accumulated(self._started)
            self._started += 1
            moved = self._accumulator.engine.to_device(batch)
            self._accumulator._microbatch = MicroBatch(
                targets, weight, auxiliary if weight else 0.0, index == 0, index == len(self._run) - 1
            )
            yield moved
        self._accumulator._check_accumulated(self._started)


class Windows:
    """The windows of a source, epoch after epoch: each `iter()` runs to the end of the current epoch.

    The position counts what finished windows used up, so it can be saved after any update and loaded into a run with
    another number of processes.
    """

    def __init__(self, accumulator: Any, source: Source, count_targets: CountTargets) -> None:
        self._accumulator = accumulator
        self._source = source
        self._count_targets = count_targets
        self.epoch = 0
        self._consumed = 0

    def __len__(self) -> int:
        """Windows in one epoch; TypeError where the source has no length."""
        length = self._source.num_windows()
        if length is None:
            raise TypeError("this source of windows has no length")
        return length

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, and the samples (or batches, of a loader or stream) that its updates consumed."""
        return {"epoch": self.epoch, f"{self._source.unit}_consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; the next `iter()` starts there."""
        key = f"{self._source.unit}_consumed"
        if key not in state:
            raise DataError(
                f"the saved position {state} does not count {self._source.unit}, as this source does; "
                "resume with the kind of source that was saved"
            )
        self.epoch, self._consumed = int(state["epoch"]), int(state[key])

    def __iter__(self) -> Iterator[Window]:
        accumulator = self._accumulator
        found_any = self._consumed > 0
        for part in self._source.parts(self.epoch, self._consumed):
            window = self._exchange(part)
            if window is None:
                break
            found_any = True
            accumulator._begin(window, self)
            yield window
            accumulator._check_finished()
        if not found_any:
            raise DataError("the source gave no batch in this epoch; is it a generator that is already used up?")
        self.epoch, self._consumed = self.epoch + 1, 0

    def _exchange(self, part: Part) -> Window | None:
        """Count this rank's targets, add up all ranks', and make the window; None where no rank has a batch left."""
        engine = self._accumulator.engine
        counts = [self._count_targets(batch) for batch in part.batches]
        samples = sum(num_samples(batch) for batch in part.batches)
        tokens = [num_tokens(batch) for batch in part.batches]
        table = engine.gather(
            [
                sum(counts),
                len(counts),
                samples,
                sum(real for real, _ in tokens),
                sum(positions for _, positions in tokens),
                part.fingerprint,
            ]
        )
        if not table[:, 1].any():
            return None
        if (table[:, 5] != table[0, 5]).any():
            raise DataError(
                "the processes read different data: each would train on batches the others also take or skip. "
                "Seed the sampler's generator alike on all processes; a loader that is already split by rank is passed as "
                "an iterable of this rank's batches"
            )
        return Window(self._accumulator, part, counts, table[:, :5])
