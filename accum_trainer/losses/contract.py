"""Classify a loss passed to `backward`: a sum or a mean, and over which terms.

There are three kinds: `causal_lm_loss`, a sum by construction; the loss that the model itself
returned, whose reduction was proven on the model; and a loss that the user computed, of which only
the user's statement is known. A mean is accepted only if it is known what it averages over, and
only over the targets that were counted: a loop that changes labels or the loss gets an error.
Knows the engine's ranks and a micro-batch's counts, but weighs and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accum_trainer.batch import Batch, halve, num_positions, num_samples, version_of
from accum_trainer.errors import AccumTrainerError, DataError, EngineError
from accum_trainer.losses.causal_lm import summed_here
from accum_trainer.losses.objective import (
    MEAN,
    REMEDY,
    SUM,
    Objective,
    batch_statistics,
    find_objective,
    moving_estimates,
    unproven,
)
from accum_trainer.losses.outputs import Call, OutputWatch
from accum_trainer.losses.packing_guard import PackingGuard
from accum_trainer.losses.targets import SHIFTED, CountTargets

# Most ways of counting whose proofs are kept; the oldest is dropped first.
_MOST_FOUND = 8
# Samples of a proof: more are not needed, and the logits of few take little memory.
_MOST_SAMPLES = 4
# Arguments of a call that change a model's own loss.
_CHANGE_THE_LOSS = ("num_items_in_batch", "shift_labels", "output_router_logits")

# (`sum` or `mean`, the loss over targets, a router's term or None)
Split = tuple[str, torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class Passed:
    """A loss as a loop passed it.

    Attributes:
        loss: shape ().
        reduction: `sum` or `mean` as the user states, or None.
        microbatch: the current micro-batch (`window.MicroBatch`).
        objective: of the windows that it belongs to.
        counts_given: the user passed `count_targets`.
    """

    loss: torch.Tensor
    reduction: str | None
    microbatch: Any
    objective: Objective | None
    counts_given: bool

    @property
    def counts(self) -> bool:
        """Whether this micro-batch contributes to the window's gradient."""
        return bool(self.microbatch.planned.weight)


class LossContract:
    """Knows the models of a loop and what each of their losses is.

    Args:
        engine: of the accumulator.

    Attributes:
        allow_batch_norm: accept that BatchNorm makes an update depend on how the batch is split.
        objective: of the model's own loss, as last found; None before `decide`.
        made_zero: the 0 that `split` last gave in place of a mean over no target, or None.
    """

    def __init__(self, engine: Any, allow_batch_norm: bool = False) -> None:
        self.objective: Objective | None = None
        self.made_zero: torch.Tensor | None = None
        self.allow_batch_norm = allow_batch_norm
        self._engine = engine
        self._models: list[torch.nn.Module] = []
        self._found: dict[CountTargets | None, Objective] = {}
        self._outputs = OutputWatch()
        self._packing = PackingGuard(engine)

    @property
    def _is_split(self) -> bool:
        plan = self._engine.plan
        return bool(plan.gradient_accumulation_steps * plan.world_size > 1)

    def watch(self, models: Sequence[torch.nn.Module]) -> None:
        """Watch these models, as the loop calls them."""
        known = {id(self._engine.unwrap(model)) for model in self._models}
        new = [model for model in models if id(self._engine.unwrap(model)) not in known]
        self._models += new
        if new:
            self._found.clear()  # it was found on another set of models
        for model in new:  # not the model inside a wrapper too: one call would be recorded twice
            self._outputs.watch(model)

    def begin_micro_batch(self, is_first: bool, has_targets: bool) -> None:
        """Restart the count of calls; before a window, check BatchNorm's modes again.

        Raises:
            EngineError: as `check_batch_norm`.
        """
        self._outputs.begin(keeps_output=not has_targets)
        if is_first:
            self.check_batch_norm()

    def forget_outputs(self) -> None:
        """Drop the references to the models' outputs."""
        self.made_zero = None
        self._outputs.clear()

    # --- finding the objective ---

    def decide(
        self, batches: Sequence[Batch], given: CountTargets | None = None
    ) -> Objective | None:
        """Find what the model's own loss sums over, before the first window is counted. Collective.

        Found once for each way of counting. Returns None if no process has a batch.

        Args:
            batches: this process's micro-batches; may be none. All processes run the largest one
                of the first process that has any.
            given: the user's count, to be compared with the model's own loss.

        Raises:
            DataError: no count is given, and the batch has no labels.
            EngineError: BatchNorm in training mode, and windows of several micro-batches.
        """
        self.watch(self._engine.prepared_models())
        # The end of an epoch that was resumed there: packed rows are to be proven on a batch.
        if not any(self._engine.gather_objects(bool(batches))):
            return None
        self._packing.decide(self._models, batches)
        self.check_batch_norm()
        if given not in self._found:
            if len(self._found) >= _MOST_FOUND:  # a function created in each epoch
                del self._found[next(iter(self._found))]
            batch = self._engine.first_of(max(batches, key=num_positions, default=None))
            assert batch is not None
            self._found[given] = self._agreed(batch, given)
        self.objective = self._found[given]
        return self.objective

    def _agreed(self, batch: Batch, given: CountTargets | None) -> Objective:
        """The worst verdict of all processes; an error on one is raised on all."""
        found: Objective | None = None
        failure: Exception | None = None
        try:
            found = self._find(self._engine.to_device(_few_samples(batch)), given)
        except Exception as error:  # the user's count may raise too
            failure = error
        self._engine.agree(failure)
        assert found is not None
        verdicts = self._engine.gather_objects(found.verdict)
        if any(other != found.verdict for other in verdicts):
            return replace(found, reduction="", reason=f"differs between processes: {verdicts}")
        return found

    def _find(self, batch: Batch, given: CountTargets | None) -> Objective:
        if len(self._models) == 1:
            model = self._engine.unwrap(self._models[0])
            return find_objective(model, batch, given, self._engine.mixed_precision != "no")
        reason = f"cannot be proven: {len(self._models)} models were prepared"
        return unproven(batch, given, reason)

    def check_batch_norm(self) -> None:
        """Check that no BatchNorm would normalise over parts of a split batch, and that no
        spectral norm would move with each part.

        Raises:
            EngineError: one is in training mode, that is not accepted, and batches are split.
        """
        if self.allow_batch_norm or not self._is_split:
            return
        for find, what, why in (
            (batch_statistics, "BatchNorm modules", "takes its own statistics"),
            (moving_estimates, "modules with spectral norm", "moves their estimate"),
        ):
            names = [name for model in self._models for name in find(model)]
            if names:
                raise EngineError(
                    f"the model has {len(names)} {what} in train mode ({', '.join(names[:3])}): "
                    f"each micro-batch {why}, so the update depends on how the batch is split. "
                    "Freeze them (module.eval() after model.train()), use another normalisation, "
                    "such as GroupNorm, or accept it with Accumulator(allow_batch_norm=True)"
                )

    # --- a loss, as it is passed to backward ---

    def split(self, passed: Passed, has_auxiliary: bool = False) -> Split:
        """Separate a loss into its reduction, its part over targets and a router's part or None.

        A mean over no target, often nan, becomes a 0 with a graph: its backward may be due.

        Args:
            passed: the loss, and what the user states about it.
            has_auxiliary: the user passed a second term, which replaces the router's.

        Raises:
            AccumTrainerError: it is not known what the loss is, or not what the user states.
            DataError: the model ran on other targets than were counted; or padding changes its own
                loss, and this batch has another length.
        """
        reduction, loss, router = self._split(passed, has_auxiliary)
        over_none = reduction == MEAN and not passed.microbatch.planned.num_targets
        self.made_zero = self._outputs.zero() if over_none else None
        loss = loss if self.made_zero is None else self.made_zero
        return reduction, loss, router

    def _split(self, passed: Passed, has_auxiliary: bool) -> Split:
        call = self._outputs.call
        made = summed_here(passed.loss)
        if made is not None:
            return self._summed(passed, made.labels, call, has_auxiliary)
        if call is not None and self._outputs.is_own(passed.loss):
            return self._own(passed, call)
        if passed.reduction != SUM and self._outputs.is_scaled_own(passed.loss):
            raise AccumTrainerError(
                "backward() got the model's own loss, divided or multiplied by a number; pass it "
                "as the model returned it: the division by K, too, is part of its weight here"
            )
        if passed.reduction is None:
            raise AccumTrainerError(
                "backward() got a loss that is neither causal_lm_loss nor what the model returned, "
                'unchanged; say what it is: reduction="sum" or reduction="mean" over the '
                "micro-batch's targets"
            )
        if passed.reduction == MEAN and not passed.counts_given:
            raise AccumTrainerError(
                "backward() got a mean that the model did not return, and it is not known what it "
                f"averages over; {REMEDY}, or pass the model's own loss as the model returned it"
            )
        objective = passed.objective
        is_counted = objective is None or bool(objective.reduction or objective.is_only_way)
        if not passed.counts_given and not is_counted:
            raise AccumTrainerError(
                "backward() got a sum that the model did not return, and it is not known how many "
                f"targets it sums over: the model's own loss {_why(objective)}; {REMEDY}"
            )
        return passed.reduction, passed.loss, self._router(call, has_auxiliary)

    def _summed(
        self, passed: Passed, labels: torch.Tensor, call: Call | None, has_auxiliary: bool
    ) -> Split:
        if passed.reduction == MEAN:
            raise AccumTrainerError(
                'causal_lm_loss is a sum over targets; leave reduction out, or say "sum"'
            )
        objective, planned = passed.objective, passed.microbatch.planned
        is_known = objective is not None and objective.reduction and not passed.counts_given
        if objective is not None and is_known and objective.counting != SHIFTED:
            raise AccumTrainerError(
                "causal_lm_loss shifts the labels by one, but this model's own loss is a "
                f"{objective.describe()}; pass model(**batch).loss instead"
            )
        if passed.counts:
            handed = passed.microbatch.targets.get("labels")
            if passed.counts_given or handed is None or not _is_as_handed(labels, handed):
                _check_count(
                    SHIFTED.count({"labels": labels}), planned.num_targets, "causal_lm_loss"
                )
        return SUM, passed.loss, self._router(call, has_auxiliary)

    def _own(self, passed: Passed, call: Call) -> Split:
        objective, reduction = passed.objective, passed.reduction
        if objective is None or not objective.reduction:
            return self._by_word(passed)
        batch = passed.microbatch.planned.batch
        objective.check_length(batch)
        _check_call(call, batch)
        if passed.counts and not passed.counts_given:
            _check_targets(objective, passed, call)
        if reduction not in (None, objective.reduction):
            raise AccumTrainerError(
                f"reduction={reduction!r}, but the model's own loss is a {objective.describe()}; "
                "leave reduction out"
            )
        if objective.reduction == SUM and not passed.counts_given:
            raise AccumTrainerError(
                f"the model's own loss is a {objective.describe()}, and an update must divide it "
                "by something; pass count_targets=function(batch) -> number of terms to divide by"
            )
        if not objective.has_router_term:
            return objective.reduction, passed.loss, None
        if call.router_term is None:
            raise AccumTrainerError(
                "the model's own loss contains a router's loss, which this call does not return "
                "separately (return_dict=False?), so the two cannot be weighed separately; call "
                "model(**batch)"
            )
        return objective.reduction, passed.loss - call.router_term, call.router_term

    def _by_word(self, passed: Passed) -> Split:
        """The model's own loss without a proof: as the user states, unless that is disproven."""
        objective, reduction = passed.objective, passed.reduction
        is_disproven = objective is not None and objective.is_disproven and self._is_split
        if reduction is not None and not is_disproven and (reduction == SUM or passed.counts_given):
            return reduction, passed.loss, None
        if is_disproven:
            remedy = "pass a loss that is a sum over targets, with count_targets"
            if passed.counts_given:
                remedy = "pass the count_targets that fits, or the sum of your loss over targets"
        elif passed.counts_given:
            remedy = 'say reduction="mean" or reduction="sum" if you know'
        else:
            remedy = f'pass the sum of your loss over targets with reduction="sum", or {REMEDY}'
        raise AccumTrainerError(
            f"the model's own loss is not known to be a mean over targets, for it "
            f"{_why(objective)}; {remedy}"
        )

    def _router(self, call: Call | None, has_auxiliary: bool) -> torch.Tensor | None:
        if call is not None and call.has_unknown_router and not has_auxiliary:
            raise AccumTrainerError(
                "the model returned a router's loss (aux_loss) and its configuration names no "
                "coefficient for it; pass auxiliary=coefficient * outputs.aux_loss, or turn "
                "output_router_logits off"
            )
        if call is None or call.router_term is None or has_auxiliary:
            return None
        if call.num_routed > 1:
            raise AccumTrainerError(
                f"the model ran {call.num_routed} times in this micro-batch, each time with a "
                "router's loss, and it is not known which of them belongs to this loss; pass "
                "auxiliary=coefficient * outputs.aux_loss"
            )
        return call.router_term


def _why(objective: Objective | None) -> str:
    return "is not known" if objective is None else objective.reason


def _check_call(call: Call, batch: Batch) -> None:
    """Raise an AccumTrainerError for an argument that changes the loss and was not proven."""
    given = batch if isinstance(batch, Mapping) else {}
    for name, value in call.inputs.items():
        is_new = name not in given and value is not None
        if is_new and (name in _CHANGE_THE_LOSS or "loss" in name):
            raise AccumTrainerError(
                f"the model was called with {name}, which changes its own loss, and that was "
                f"proven without it; leave {name} out: acc.backward() gives the loss its weight"
            )


def _check_targets(objective: Objective, passed: Passed, call: Call) -> None:
    """Raise a DataError if the model ran on other targets than were counted.

    The window's own tensors, unchanged, need no look at their values, which would wait for the
    device.
    """
    handed = passed.microbatch.targets
    used = {key: call.inputs.get(key) for key in handed}
    if all(_is_as_handed(used[key], handed[key]) for key in handed):
        return  # also if the batch holds no targets under a known name
    if any(value is None for value in used.values()):
        raise DataError(
            f"the model's own loss was computed without the batch's {', '.join(handed)}; pass "
            "the batch as it is"
        )
    _check_count(
        objective.counting.count(call.inputs), passed.microbatch.planned.num_targets, "the model"
    )


def _is_as_handed(found: Any, handed: tuple[torch.Tensor, int]) -> bool:
    return found is handed[0] and version_of(handed[0]) == handed[1]


def _check_count(found: float, planned: float, who: str) -> None:
    if found != planned:
        raise DataError(
            f"{who} ran on {found:g} targets, and {planned:g} were counted in the micro-batch "
            "before the window began, which gave its loss the weight: the loop changed labels or "
            "samples, or count_targets counts otherwise. Change them in collate_fn, or before the "
            "batches reach acc.windows()"
        )


def _few_samples(batch: Batch) -> Batch:
    """The first samples of a batch, if it can be split."""
    while num_samples(batch) > _MOST_SAMPLES:
        try:
            batch = halve(batch)[0]
        except DataError:
            return batch
    return batch
