"""Compare the weights after an update with `start - lr * gradient`, and say what else moved them.

`measure_movement` reduces one update to inner products per parameter, so no weights are kept;
`update_check` judges all of them. Knows plain SGD and the schedule's rate; no loss and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from accum_trainer.verify.big_batch import Gradient
from accum_trainer.verify.report import FAIL, INFO, PASS, Check
from accum_trainer.verify.tolerance import FLOAT32_TOLERANCE

NAME = "update = lr x gradient"
# A movement this near to a multiple of the gradient is one; a rate this near to another is it.
_MATCH = 1e-3
_RATES_TRIED = 100  # updates of the schedule among which a rate is looked for
_MOVED, _START, _GRADIENT = range(3)

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Movement:
    """How one update moved the weights: moved = after - start, beside the gradient of its step.

    Attributes:
        products: parameter -> inner products of (moved, start, gradient), shape (3, 3), float64.
        rounding: norm of what one rounding of every weight can add.
    """

    products: Mapping[str, np.ndarray]
    rounding: float

    def error(self, rate: float) -> float:
        """|moved + rate * gradient| / |rate * gradient|; inf if the weights are not finite."""
        if not np.isfinite(self._total).all():
            return math.inf
        return self._left(self._total, rate) / self._size(rate)

    def tolerance(self, rate: float) -> float:
        """The float32 tolerance, and one rounding of every weight."""
        return FLOAT32_TOLERANCE + self.rounding / self._size(rate)

    def worst(self, rate: float) -> str:
        """Name of the parameter with the largest share of the difference."""
        return max(self.products, key=lambda name: self._left(self.products[name], rate))

    def fitted(self) -> tuple[float, float] | None:
        """(shrink, rate) with moved = (shrink - 1) * start - rate * gradient; None if no two
        numbers give it. shrink is exactly 1 if the gradient alone explains the movement."""
        total = self._total
        if not np.isfinite(total).all():
            return None
        moved = math.sqrt(total[_MOVED, _MOVED])
        limit = _MATCH * moved + self.rounding
        rate = -float(total[_MOVED, _GRADIENT] / total[_GRADIENT, _GRADIENT])
        alone = self._left(total, rate)
        pair = [_START, _GRADIENT]
        a, b = np.linalg.lstsq(total[np.ix_(pair, pair)], total[_MOVED, pair], rcond=None)[0]
        together = self._left(total, -float(b), float(a))
        is_small_part = (
            together <= 0.1 * alone and alone > FLOAT32_TOLERANCE * moved + self.rounding
        )
        if alone <= limit and not is_small_part:
            return 1.0, rate if moved > self.rounding else 0.0
        return (1 + float(a), -float(b)) if together <= limit else None

    def _size(self, rate: float) -> float:
        """|rate * gradient|; of the gradient alone at rate 0, as in a warm-up's first update."""
        return (abs(rate) or 1.0) * math.sqrt(self._total[_GRADIENT, _GRADIENT])

    @property
    def _total(self) -> np.ndarray:
        return np.sum(list(self.products.values()), axis=0)

    @staticmethod
    def _left(products: np.ndarray, rate: float, shift: float = 0.0) -> float:
        """|moved - shift * start + rate * gradient|."""
        c = np.array([1.0, -shift, rate])
        return math.sqrt(max(0.0, float(c @ products @ c)))


@dataclass(frozen=True)
class Update:
    """One call of a loop that stepped the optimizer once.

    Attributes:
        window: its name.
        updates_before: steps of the scheduler before the call.
        early_steps: steps of the scheduler in the call, before the optimizer's step.
        scheduler_steps: all of the call.
        rate_in_force: the optimizer's learning rate at its step.
    """

    window: str
    movement: Movement = field(repr=False)
    updates_before: int
    early_steps: int
    scheduler_steps: int
    rate_in_force: float


def measure_movement(start: Gradient, after: Gradient, gradient: Gradient) -> Movement | None:
    """The movement of the parameters in `after`; None if the gradient is 0 or not finite, so that
    nothing can be compared.

    Args:
        start, after: weights by parameter name, on the CPU.
        gradient: the gradient that this rank's optimizer stepped with; a parameter without one
            must not move.
    """
    products, squares = {}, 0.0
    for name, end in after.items():
        begin = start[name].double().flatten()
        moved, zero = end.double().flatten() - begin, torch.zeros_like(begin)
        g = gradient[name].double().flatten() if name in gradient else zero
        vectors = torch.stack([moved, begin, g])
        products[name] = (vectors @ vectors.T).numpy()
        precision = torch.finfo(end.dtype).eps if end.is_floating_point() else 0.0
        squares += precision**2 * float(products[name][_START, _START])
    size = sum(float(product[_GRADIENT, _GRADIENT]) for product in products.values())
    if not (math.isfinite(size) and size > 0):
        return None
    return Movement(products, math.sqrt(squares))


def update_check(updates: Sequence[Update], schedule: Schedule) -> Check:
    """One row of the report: did every update move the weights by the schedule's rate times the
    gradient?

    A loop that never steps the scheduler may set the rate itself; the update is then compared at
    that rate, and the rate is reported, not judged.
    """
    if not updates:
        meaning = (
            "not compared: no call of the function made one optimizer step with a finite gradient"
        )
        return Check(NAME, INFO, meaning)
    sets_own_rate = not any(u.scheduler_steps for u in updates)
    rates = [u.rate_in_force if sets_own_rate else _due(u, schedule) for u in updates]
    pairs = list(zip(updates, rates, strict=True))
    errors = [u.movement.error(rate) for u, rate in pairs]
    limits = [u.movement.tolerance(rate) for u, rate in pairs]
    wrong = [i for i, error in enumerate(errors) if not error <= limits[i]]
    if wrong:
        i = wrong[0]
        lines = [f"  {updates[j].window}: {_found(updates[j], rates[j])}" for j in wrong]
        return Check(
            NAME,
            FAIL,
            f"the update is not lr x gradient: {_cause(updates[i], rates[i], schedule)}",
            errors[i],
            limits[i],
            ("right: weights = start - lr(u) * g, g the gradient at the optimizer's step", *lines),
        )
    meaning = "each update moves the weights by the schedule's learning rate times the gradient"
    if sets_own_rate and not all(_same(rate, _due(u, schedule)) for u, rate in pairs):
        found = ", ".join(f"{rate:.4g}" for rate in rates)
        meaning = (
            "each update moves the weights by the optimizer's learning rate times the gradient; "
            "the function sets that rate and never steps the scheduler, so the rates are not "
            f"judged: {found}"
        )
    nearest = max(range(len(errors)), key=lambda i: errors[i] / limits[i])
    return Check(NAME, PASS, meaning, errors[nearest], limits[nearest])


def _due(update: Update, schedule: Schedule) -> float:
    """The rate that this update should have. If the scheduler does not step once per update, which
    another check names, the rate that it has at the step."""
    steps = update.early_steps if update.scheduler_steps > 1 else 0
    return schedule(update.updates_before + steps)


def _found(update: Update, due: float) -> str:
    """What the weights did, in the units of the right update."""
    fitted = update.movement.fitted()
    if fitted is None:
        return "no multiple of the gradient, nor of the weights and the gradient"
    shrink, rate = fitted
    scaled = "" if shrink == 1 else f"{_factor(shrink)} * "
    return f"weights = {scaled}start - {rate:.4g} * g, right start - {due:.4g} * g"


def _factor(shrink: float) -> str:
    """A factor that may be very near to 1."""
    return f"{shrink:.4g}" if abs(1 - shrink) > 1e-3 else f"(1 - {1 - shrink:.3g})"


def _cause(update: Update, due: float, schedule: Schedule) -> str:
    fitted = update.movement.fitted()
    if fitted is None:
        return (
            f"most of the difference is in {update.movement.worst(due)}; something besides "
            "optimizer.step() changes the weights, such as another optimizer or an assignment, or "
            "the loop changes the optimizer's options; leave that out for this check"
        )
    shrink, rate = fitted
    if shrink != 1:
        return (
            f"the weights are also multiplied by {_factor(shrink)}; leave a weight decay out for "
            "this check, by hand or in the optimizer's options"
        )
    factor = rate / due if due else math.inf
    times = f"all weights moved {factor:.4g} times as far"
    if rate == 0:
        return f"{times}: the update is thrown away, the weights are those from before the call"
    if _same(rate, update.rate_in_force):
        return f"{times}: {_other_rate(update, due, schedule)}"
    if round(factor) > 1 and _same(factor, round(factor)):
        return (
            f"{times}: the gradient is applied {factor:.0f} times, as by another optimizer on the "
            "same parameters"
        )
    return (
        f"{times}, at a learning rate of {rate:.4g}, and the optimizer has "
        f"{update.rate_in_force:.4g}; something besides optimizer.step() moves the weights"
    )


def _other_rate(update: Update, due: float, schedule: Schedule) -> str:
    """Why the optimizer's rate at its step is not the schedule's."""
    u = update.updates_before
    if update.early_steps and _same(update.rate_in_force, schedule(u + update.early_steps)):
        return (
            "scheduler.step() runs before optimizer.step(), so the update has the learning rate of "
            f"the next, schedule({u + update.early_steps}) and not schedule({u}); step the "
            "scheduler after the optimizer"
        )
    meets = [v for v in range(_RATES_TRIED) if _same(update.rate_in_force, schedule(v))]
    which = f", the schedule's after {meets[0]} updates" if meets else ""
    return (
        f"the learning rate at the step is {update.rate_in_force:.4g}{which}, and the schedule "
        f"has {due:.4g} there; the loop changes optimizer.param_groups, which is left to the "
        "scheduler"
    )


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _MATCH * abs(b)
