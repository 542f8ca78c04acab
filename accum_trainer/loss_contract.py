"""What the loss that a loop passes to `backward` is: a sum or a mean, and over what.

Three kinds of loss are told apart: `causal_lm_loss`, a sum by construction; the number that the
model itself returned, whose reduction was proven on the model; and one that the user made, of which
nothing is known but the user's word. A mean is taken only if somebody knows what it averages over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accum_trainer.data.halving import halve, num_positions
from accum_trainer.data.windows import Batch, num_samples
from accum_trainer.errors import AccumTrainerError, DataError, EngineError
from accum_trainer.loss import is_summed_here
from accum_trainer.objective import (
    MEAN,
    REMEDY,
    SUM,
    Objective,
    batch_statistics,
    find_objective,
    unproven,
)
from accum_trainer.outputs import OutputWatch
from accum_trainer.packing_guard import PackingGuard
from accum_trainer.targets import SHIFTED, CountTargets

# A proof needs no more samples, and the logits of few take little memory.
_MOST_SAMPLES = 4


class LossContract:
    """Knows the models of a loop, and what each loss of theirs is.

    Args:
        engine: of the accumulator.

    Attributes:
        allow_batch_norm: accept that BatchNorm makes an update depend on its cut.
        objective: what the model's own loss sums over; None before `decide`.
    """

    def __init__(self, engine: Any, allow_batch_norm: bool = False) -> None:
        self.objective: Objective | None = None
        self._engine = engine
        self.allow_batch_norm = allow_batch_norm
        self._models: list[torch.nn.Module] = []
        self._outputs = OutputWatch()
        self._packing = PackingGuard(engine)

    def watch(self, models: Sequence[torch.nn.Module]) -> None:
        """Know these models, as the loop calls them."""
        known = {id(self._engine.unwrap(model)) for model in self._models}
        self._models += [model for model in models if id(self._engine.unwrap(model)) not in known]
        for model in models:
            self._outputs.watch(model)

    def forget_outputs(self) -> None:
        """Let go of what the models returned."""
        self._outputs.clear()

    # --- finding the objective ---

    def decide(self, batches: Sequence[Batch], given: CountTargets | None = None) -> Objective | None:
        """Find what the model's own loss sums over, before the first window is counted. Collective.

        Returns None if no process has a batch.

        Args:
            batches: this process's micro-batches, if it has any; the one with most in it, on the
                first process that has one, is what all processes run.
            given: the user's own count, to be compared with the model's own loss.

        Raises:
            DataError: no count is given, and the batch has no labels.
            EngineError: BatchNorm in train mode, and windows of several micro-batches.
        """
        self.watch(self._engine.prepared_models())
        self._packing.decide(self._models, batches)
        plan = self._engine.plan
        if plan.gradient_accumulation_steps * plan.world_size > 1 and not self.allow_batch_norm:
            self._refuse_batch_norm()
        batch = self._engine.first_of(max(batches, key=num_positions, default=None))
        if batch is None:
            return None
        found: Objective | DataError
        try:
            found = self._find(self._engine.to_device(_few_samples(batch)), given)
        except DataError as error:
            found = error
        verdicts = self._engine.gather_objects(str(found) if isinstance(found, DataError) else found.verdict)
        if isinstance(found, DataError):
            raise found
        if any(other != found.verdict for other in verdicts):  # the worst verdict of all ranks holds
            found = replace(found, reduction="", reason=f"differs between processes: {verdicts}")
        self.objective = found
        return found

    def _find(self, batch: Batch, given: CountTargets | None) -> Objective:
        if len(self._models) == 1:
            model = self._engine.unwrap(self._models[0])
            return find_objective(model, batch, given, self._engine.mixed_precision != "no")
        reason = f"cannot be proven: {len(self._models)} models were prepared"
        return unproven(batch, given, reason)

    def _refuse_batch_norm(self) -> None:
        names = [name for model in self._models for name in batch_statistics(model)]
        if names:
            raise EngineError(
                f"the model has {len(names)} BatchNorm modules in train mode "
                f"({', '.join(names[:3])}): each micro-batch would be normalised by its own "
                "statistics, so the update depends on how the batch is cut. Freeze them "
                "(module.eval() after model.train()), use GroupNorm, or accept it with "
                "Accumulator(allow_batch_norm=True)"
            )

    # --- a loss, as it is passed to backward ---

    def split(
        self, loss: torch.Tensor, reduction: str | None, counts_given: bool, batch: Batch
    ) -> tuple[str, torch.Tensor, torch.Tensor | None]:
        """(`sum` or `mean`, the loss over targets, a router's term or None).

        Args:
            reduction: what the user says the loss is, or None.
            counts_given: the user said how targets are counted.
            batch: the micro-batch that the loss is of.

        Raises:
            AccumTrainerError: nobody knows what the loss is, or it is not what the user says.
            DataError: padding changes the model's own loss, and `batch` has another length.
        """
        if is_summed_here(loss):
            return self._summed(loss, reduction, counts_given)
        if self._outputs.is_own(loss):
            if self.objective is not None:
                self.objective.check_length(batch)
            return self._own(loss, reduction, counts_given)
        if reduction is None:
            raise AccumTrainerError(
                "backward() got a loss that is neither causal_lm_loss nor what the model returned; "
                'say what it is: reduction="sum" or reduction="mean" over the micro-batch\'s targets'
            )
        if reduction == MEAN and not counts_given:
            raise AccumTrainerError(
                "backward() got a mean that the model did not return, and nobody knows what it "
                f"averages over; {REMEDY}, or pass the model's own loss as the model returned it"
            )
        if not counts_given and not self._counts_are_known:
            raise AccumTrainerError(
                "backward() got a sum that the model did not return, and nobody knows how many "
                f"targets it sums over: the model's own loss {self._why_unknown}; {REMEDY}"
            )
        return reduction, loss, self._outputs.router_term

    @property
    def _counts_are_known(self) -> bool:
        """Whether there is one way to count: it was proven, or the labels leave no choice."""
        return self.objective is None or bool(self.objective.reduction or self.objective.is_only_way)

    @property
    def _why_unknown(self) -> str:
        return "" if self.objective is None else self.objective.reason

    def _summed(
        self, loss: torch.Tensor, reduction: str | None, counts_given: bool
    ) -> tuple[str, torch.Tensor, torch.Tensor | None]:
        if reduction == MEAN:
            raise AccumTrainerError('causal_lm_loss is a sum over targets; leave reduction out, or say "sum"')
        objective = self.objective
        is_known = objective is not None and objective.reduction and not counts_given
        if objective is not None and is_known and objective.counting != SHIFTED:
            raise AccumTrainerError(
                "causal_lm_loss shifts the labels by one, but this model's own loss is a "
                f"{objective.describe()}; pass model(**batch).loss instead"
            )
        return SUM, loss, self._outputs.router_term

    def _own(
        self, loss: torch.Tensor, reduction: str | None, counts_given: bool
    ) -> tuple[str, torch.Tensor, torch.Tensor | None]:
        objective = self.objective
        if objective is None or not objective.reduction:
            if reduction == SUM:
                return SUM, loss, None  # a sum can be cut whatever it sums over
            why = f": it {self._why_unknown}"
            raise AccumTrainerError(
                f"the model's own loss is not known to be a mean over targets{why}; "
                'pass the sum of your loss over targets with reduction="sum"'
                + ("" if counts_given else f", or {REMEDY}")
            )
        if reduction not in (None, objective.reduction):
            raise AccumTrainerError(
                f"reduction={reduction!r}, but the model's own loss is a {objective.describe()}; leave reduction out"
            )
        if objective.reduction == SUM and not counts_given:
            raise AccumTrainerError(
                f"the model's own loss is a {objective.describe()}, and an update has to divide it "
                "by something; pass count_targets=function(batch) -> number of terms to divide by"
            )
        router = self._outputs.router_term if objective.has_router_term else None
        return objective.reduction, loss if router is None else loss - router, router


def _few_samples(batch: Batch) -> Batch:
    """The first samples of a batch, if it can be cut."""
    while num_samples(batch) > _MOST_SAMPLES:
        try:
            batch = halve(batch)[0]
        except DataError:
            return batch
    return batch
