"""`Counter`: how many targets a batch has, as the user said or as was proven. It reads no data."""

from __future__ import annotations

from collections.abc import Sequence

from accum_trainer.batch import Batch
from accum_trainer.losses.contract import LossContract
from accum_trainer.losses.objective import Objective
from accum_trainer.losses.targets import CountTargets


class Counter:
    """Counts a batch's targets: as the user said, or as the model's own loss was proven to.

    Attributes:
        given: the user's function, or None.
        objective: what the model's own loss sums over; None until it is decided.
    """

    def __init__(self, losses: LossContract, given: CountTargets | None) -> None:
        self._losses = losses
        self.given = given
        self.objective: Objective | None = None

    def decide(self, batches: Sequence[Batch]) -> None:
        """Find the objective, on the micro-batch with most to prove it on. Collective."""
        # None if no rank had a batch: at the end of an epoch that was resumed.
        self.objective = self._losses.decide(batches, self.given)

    def __call__(self, batch: Batch) -> float:
        if self.given is not None:
            return self.given(batch)
        assert self.objective is not None
        self.objective.check_length(batch)
        return self.objective.counting.count(batch)
