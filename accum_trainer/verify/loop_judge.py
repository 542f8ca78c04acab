"""Judge the updates of a loop: compare its gradients with the definition, and name the fault.

A gradient that differs from the right one is compared with those of all known faults. The nearest
within a limit is the fault; if several are equally near, other windows decide. The weights that the
loop gave its micro-batches are found by least squares. Runs on rank 0; knows observations, not the
loop.
`loop_update` judges how the weights of the model moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.base import Engine
from accum_trainer.verify.big_batch import BigBatch, Row, clip_factor
from accum_trainer.verify.loop_faults import RIGHT, TAIL, Fault, MicroBatchGradients, Vector, flat
from accum_trainer.verify.loop_runner import Observation, scheduled_rate
from accum_trainer.verify.loop_update import update_check
from accum_trainer.verify.loop_windows import FIRST, LONG_ROW
from accum_trainer.verify.report import FAIL, INFO, PASS, Check
from accum_trainer.verify.shared_checks import separability_check
from accum_trainer.verify.tolerance import (
    LONG_ROW_MARGIN,
    PRECISION_MARGIN,
    error_and_tolerance,
    low_precision_peer,
    peer_errors,
    window_lines,
)

# A gradient this near to that of a known fault has that fault. In 16 bits, so has one within this
# multiple of one big batch's error: a single window's rounding can be larger than that.
_MATCH, _MATCH_ROUNDED = 1e-3, 2.0


@dataclass(frozen=True)
class _Verdict:
    """The verdict on all windows of one name: right if `error` is within `tolerance`.

    Attributes:
        meaning: the finding, without a named fault.
        faults: if it is wrong, the faults, or combinations of them, that explain the gradient.
        hint: a sentence for a loop that is wrong here and right in the first window.
    """

    name: str
    meaning: str
    error: float | None = None
    tolerance: float | None = None
    faults: Sequence[tuple[Fault, ...]] = ()
    details: tuple[str, ...] = ()
    hint: str = ""

    @property
    def is_right(self) -> bool:
        error, tolerance = self.error, self.tolerance
        return error is not None and tolerance is not None and error <= tolerance

    def check(self, certain: set[Fault], first_is_right: bool) -> Check:
        """The row of the report; `certain` are the faults that another window has proven."""
        hint = f"; {self.hint}" if self.hint and first_is_right else ""
        if self.is_right:
            return Check(self.name, PASS, self.meaning, self.error, self.tolerance, self.details)
        if not self.faults:
            meaning = self.meaning + hint
            return Check(self.name, FAIL, meaning, self.error, self.tolerance, self.details)
        known = max(len(certain & set(faults)) for faults in self.faults)
        named = [faults for faults in self.faults if len(certain & set(faults)) == known]
        # A fault that whole windows would have shown too, and did not, is not the tail's.
        named = [faults for faults in named if TAIL in faults and not known] or named
        meaning = "; or ".join(" AND ".join(fault.sentence for fault in faults) for faults in named)
        meaning += hint
        formulas = tuple(f"loop:  {fault.formula}" for faults in named for fault in faults)
        return Check(
            self.name, FAIL, meaning, self.error, self.tolerance, (RIGHT, *formulas, *self.details)
        )


@dataclass(frozen=True)
class _Comparison:
    """One window's gradient beside the right one.

    Attributes:
        error: relative; nan if the gradient is not finite.
        peer_error: of one big batch in the same 16-bit precision; None in float32.
    """

    gradient: Vector
    right: Vector
    micro_batches: MicroBatchGradients
    error: float
    peer_error: float | None


class LoopJudge:
    """Compares observed updates with the definition.

    Args:
        make_model: the plain model, with the weights that the loop starts from.
        max_grad_norm: a loop may clip to this, once.
    """

    def __init__(
        self,
        engine: Engine,
        make_model: Callable[[], torch.nn.Module],
        plan: BatchPlan,
        max_grad_norm: float | None,
    ) -> None:
        self._exact, self._peer = BigBatch(make_model()), low_precision_peer(engine, make_model)
        self._precision = engine.mixed_precision
        self._sizes = {
            n: p.numel() for n, p in self._exact.model.named_parameters() if p.requires_grad
        }
        self._plan, self._max_grad_norm = plan, max_grad_norm

    def separability(self, rows: Sequence[Row]) -> Check:
        return separability_check(self._exact, rows)

    def checks(self, observed: Sequence[Observation]) -> list[Check]:
        """The rows of the report: each kind of window, then what holds for all updates."""
        names = dict.fromkeys(one.window.name for one in observed)
        verdicts = [
            self._verdict(name, [one for one in observed if one.window.name == name])
            for name in names
        ]
        # If several faults explain one window, another window may have proven one of them.
        certain = {fault for v in verdicts if len(v.faults) == 1 for fault in v.faults[0]}
        first_is_right = any(v.is_right for v in verdicts if v.name == FIRST)
        updates = [one.update for one in observed if one.update is not None]
        return [
            *(verdict.check(certain, first_is_right) for verdict in verdicts),
            update_check(updates, scheduled_rate),
            _equality_check(observed),
            _steps_check(observed),
            _scheduler_check(observed),
        ]

    def _verdict(self, name: str, observed: Sequence[Observation]) -> _Verdict:
        """Compare all windows of this name with the big batch; explain the worst if it is wrong."""
        hint, compared = observed[0].window.hint, []
        for one in observed:
            if one.gradient is None or max(one.optimizer_steps) > 1:
                meaning = (
                    "the function must make one update, and the optimizer stepped "
                    f"{_times(one.optimizer_steps)}"
                )
                return _Verdict(name, meaning, hint=hint)
            compared.append(self._compare(one, flat(one.gradient, self._sizes)))
            if not math.isfinite(compared[-1].error):
                return _not_finite(name, compared[-1].micro_batches, hint)
        errors, of_peer = [one.error for one in compared], [one.peer_error for one in compared]
        margin = LONG_ROW_MARGIN if name == LONG_ROW else PRECISION_MARGIN
        error, tolerance = error_and_tolerance(errors, of_peer, margin)
        lines = window_lines(errors, of_peer, self._precision)
        if error <= tolerance:
            return _Verdict(name, self._describe_right(compared[0]), error, tolerance, (), lines)
        worst = max(range(len(observed)), key=lambda i: errors[i] / (of_peer[i] or 1.0))
        details = (*_weights_found(compared[worst]), *lines)
        if self._was_right(observed[worst], compared[worst], tolerance):
            meaning = (
                "the gradient is right when optimizer.step() begins and wrong when it ends: a step "
                f"hook or closure changes it; {self._describe_unknown(compared[worst])}"
            )
            return _Verdict(name, meaning, error, tolerance, (), details, hint)
        leftover = flat(observed[worst].leftover, self._sizes)
        return _Verdict(
            name,
            self._describe_unknown(compared[worst]),
            error,
            tolerance,
            self._faults_of(compared[worst], leftover),
            details,
            hint,
        )

    def _was_right(self, one: Observation, compared: _Comparison, tolerance: float) -> bool:
        """Whether the gradient was right before a hook of the step changed it."""
        if one.handed is None:
            return False
        return self._distance(flat(one.handed, self._sizes), compared.right) <= tolerance

    def _compare(self, observation: Observation, gradient: Vector) -> _Comparison:
        micro_batches = MicroBatchGradients(
            self._exact,
            self._sizes,
            observation.window.ranks,
            self._plan.gradient_accumulation_steps,
        )
        right = micro_batches.combine(micro_batches.right)
        peer_error = None
        if self._peer is not None:
            rows = observation.window.rows
            truth = self._exact.truth(rows)
            peer_error, _ = peer_errors(self._peer, observation.start, rows, truth)
        error = self._distance(gradient, right) if torch.isfinite(gradient).all() else math.nan
        return _Comparison(gradient, right, micro_batches, error, peer_error)

    def _distance(self, found: Vector, candidate: Vector) -> float:
        """Relative distance to the candidate or to the candidate clipped once, whichever is less: a
        loop may clip or not."""
        norm = float(candidate.norm()) or 1.0
        factor = clip_factor(norm, self._max_grad_norm)
        plain = float((found - candidate).norm()) / norm
        return min(plain, float((found - factor * candidate).norm()) / (factor * norm))

    def _describe_right(self, one: _Comparison) -> str:
        clipped = float(one.gradient.norm()) < 0.999 * float(one.right.norm())
        how = f", clipped once to {self._max_grad_norm:g}" if clipped else ""
        return f"the big batch's gradient{how}"

    def _faults_of(self, one: _Comparison, leftover: Vector) -> list[tuple[Fault, ...]]:
        """The faults that give this gradient: the nearest, and equally simple ones as near as it;
        empty if all are too far."""
        distances = [
            (self._distance(one.gradient, vector), faults)
            for faults, vector in one.micro_batches.candidates(leftover, self._max_grad_norm)
        ]
        nearest = min(distance for distance, _ in distances)
        if nearest > max(_MATCH, _MATCH_ROUNDED * (one.peer_error or 0.0)):
            return []
        alike = [faults for distance, faults in distances if distance <= 1.5 * nearest + 1e-7]
        return [faults for faults in alike if len(faults) == min(map(len, alike))]

    def _describe_unknown(self, one: _Comparison) -> str:
        """A gradient that no known fault gives, in words."""
        found, right = one.gradient, one.right
        cosine = float(found @ right / (found.norm() * right.norm())) if found.any() else 0.0
        if cosine > 1 - 1e-6:
            return (
                "the gradient has the right direction but "
                f"{float(found.norm() / right.norm()):.4g} times the right length (its norm is "
                f"{float(found.norm()):.4g}; a loop may clip to "
                f"max_grad_norm={self._max_grad_norm} and nothing else)"
            )
        if 1e-4 < one.error < 1e-1 and cosine > 0.99:
            return (
                f"none of the known faults, but {one.error:.1e} off: is something kept or summed "
                "in low precision?"
            )
        return (
            f"none of the known faults: the gradient is {one.error:.2g} off (cosine "
            f"{cosine:.4f}); does the loss compare the rows of a micro-batch with each other, "
            "weigh its targets, or leave some out?"
        )


def _not_finite(name: str, micro_batches: MicroBatchGradients, hint: str) -> _Verdict:
    has_empty = any(0 in rank for rank in micro_batches.targets)
    why = (
        "a mean over no target is 0/0; use the sum of the losses"
        if has_empty
        else "the loop divides by 0 or overflows"
    )
    meaning = f"the gradient is not finite: {why}"
    return _Verdict(name, meaning, math.inf, details=(RIGHT,), hint=hint)


def _weights_found(one: _Comparison) -> tuple[str, ...]:
    """One line per micro-batch with targets: the weight of its summed loss in units of the right
    one, 1/N, by least squares."""
    targets, gradients = one.micro_batches.targets, one.micro_batches.gradients
    steps = [(r, k) for r, rank in enumerate(targets) for k, n in enumerate(rank) if n > 0]
    columns = torch.stack([gradients[r][k] for r, k in steps])
    fitted = torch.linalg.pinv(columns @ columns.T, hermitian=True) @ (columns @ one.gradient)
    left = float((fitted @ columns - one.gradient).norm() / (one.gradient.norm() or 1.0))
    if left > 1e-2:
        return (
            f"loop:  no weighted sum of the micro-batches' gradients ({left:.0%} of it is "
            "something else)",
        )
    return tuple(
        f"  rank {r} micro-batch {k}: {targets[r][k]:5} targets, weight found "
        f"{weight * one.micro_batches.num_targets:8.4f} / N, right 1 / N"
        for (r, k), weight in zip(steps, fitted.tolist(), strict=True)
    )


def _equality_check(observed: Sequence[Observation]) -> Check:
    name, ranks = "equal weights", len(observed[0].window.ranks)
    if ranks == 1:
        return Check(name, INFO, "one rank only")
    unequal = sorted({parameter for one in observed for parameter in one.unequal})
    if not unequal:
        meaning = f"all weights are equal to the bit on {ranks} ranks after each update"
        return Check(name, PASS, meaning)
    names = ", ".join(unequal[:3]) + (f" and {len(unequal) - 3} more" if len(unequal) > 3 else "")
    meaning = (
        f"left out of the exchange: after an update the ranks hold different weights of {names}"
    )
    details = (
        "right:  the last backward of a window runs through the model that prepare() returned, "
        "outside no_sync",
        "loop:  each rank steps with its own gradient of these parameters",
    )
    return Check(name, FAIL, meaning, details=details)


def _steps_check(observed: Sequence[Observation]) -> Check:
    name = "one optimizer step"
    wrong = [one for one in observed if set(one.optimizer_steps) != {1}]
    if not wrong:
        return Check(name, PASS, "the optimizer steps once per update")
    one = wrong[0]
    meaning = (
        f"the optimizer steps {_times(one.optimizer_steps)} in the {one.window.name}, and "
        "should once per update"
    )
    if one.optimizer_steps[0] == len(one.window.ranks[0]) > 1:
        meaning += ": it steps per micro-batch, so nothing accumulates"
    return Check(name, FAIL, meaning)


def _times(steps: Sequence[int]) -> str:
    """`2 times`; by rank if the ranks differ."""
    if len(set(steps)) == 1:
        return f"{steps[0]} times"
    return ", ".join(f"{count} times on rank {rank}" for rank, count in enumerate(steps))


def _scheduler_check(observed: Sequence[Observation]) -> Check:
    name = "scheduler per update"
    total = sum(one.scheduler_steps for one in observed)
    if total == 0:
        return Check(name, INFO, "the function does not step the scheduler")
    wrong = [one for one in observed if one.scheduler_steps != 1]
    if not wrong:
        return Check(name, PASS, "the scheduler steps once per update")
    one, updates = wrong[0], len(observed)
    each = " per micro-step" if one.scheduler_steps == len(one.window.ranks[0]) else ""
    meaning = (
        f"scheduler stepped{each}: {one.scheduler_steps} times in the {one.window.name}, and "
        "should once per update"
    )
    details = (
        f"right:  the learning rate after u updates is schedule(u); after {updates} updates "
        f"schedule({updates})",
        f"loop:  after {updates} updates it is schedule({total})",
    )
    return Check(name, FAIL, meaning, details=details)
