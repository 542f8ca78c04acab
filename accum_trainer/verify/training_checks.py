"""The checks of a training: each measured window against the float64 big batch, as report rows.

Knows measurements and the settings in force; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accum_trainer.accumulator import Accumulator
from accum_trainer.verify.report import FAIL, INFO, PASS, Check, measured
from accum_trainer.verify.tolerance import error_and_tolerance, precision_margin, window_lines

# torch sums a norm in float32: over a million squares that alone is 1e-5 off. A wrong clip is off
# by far more.
NORM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Measurement:
    """One window against the reference. Errors are relative.

    Attributes:
        is_tail: the window is shorter than the effective batch.
        error, loss_error: of the averaged gradient, and of the logged loss.
        peer_error, peer_loss_error: the same for one big batch in the same 16-bit precision; None
            in float32.
        worst: the parameter with the largest share of `error`.
        norm: of the reference gradient, before clipping.
        norm_error: the larger error of the norm reported and of the norm given to the optimizer.
        exchanges, expected_exchanges: gradient exchanges counted, and those `grad_sync` makes.
        unequal: parameters that differ between ranks after the update.
    """

    is_tail: bool
    num_samples: int
    error: float
    peer_error: float | None
    worst: str
    loss_error: float
    peer_loss_error: float | None
    norm: float
    norm_error: float
    exchanges: int
    expected_exchanges: int
    unequal: list[str]


def training_checks(
    found: Sequence[Measurement], accumulator: Accumulator, num_rows: int
) -> list[Check]:
    """All checks of the windows `found`, in the order of the report."""
    return [
        *_gradient_checks(found, accumulator, num_rows),
        _loss_check(found, accumulator),
        _exchange_check(found, accumulator),
        _equality_check(found, accumulator.engine.world_size),
        _clip_check(found, accumulator.max_grad_norm),
    ]


def engine_check(accumulator: Accumulator) -> Check:
    engine, plan = accumulator.engine, accumulator.plan
    meaning = (
        f"{engine.name} on {engine.device.type}, precision {engine.mixed_precision}, "
        f"{plan.describe()}; every source of K agrees, or this would not have started"
    )
    if plan.gradient_accumulation_steps * plan.world_size == 1:
        meaning += ". K = 1 on one process cuts nothing: verify the K that you train with"
    return Check("engine in force", INFO, meaning)


def _gradient_checks(
    found: Sequence[Measurement], accumulator: Accumulator, num_rows: int
) -> list[Check]:
    wholes, tails = [m for m in found if not m.is_tail], [m for m in found if m.is_tail]
    batch = accumulator.plan.global_batch_size
    checks = []
    if wholes:
        meaning = (
            f"the gradient of {len(wholes)} window{'s' if len(wholes) > 1 else ''} of "
            f"{batch} samples is that of one big batch in float64"
        )
        checks.append(_gradient_check("update = one big batch", wholes, meaning, accumulator))
    if not tails:
        meaning = f"there is none: {num_rows} samples are a multiple of {batch}"
        return [*checks, Check("tail window", INFO, meaning)]
    last = (
        "the epoch's last window" if len(tails) == 1 else f"the last windows of {len(tails)} epochs"
    )
    meaning = f"the same for {last}, of {tails[0].num_samples} samples"
    return [*checks, _gradient_check("tail window", tails, meaning, accumulator)]


def _gradient_check(
    name: str, windows: Sequence[Measurement], meaning: str, accumulator: Accumulator
) -> Check:
    errors, of_peer = [m.error for m in windows], [m.peer_error for m in windows]
    margin = precision_margin(accumulator.engine)
    error, tolerance = error_and_tolerance(errors, of_peer, margin)
    precision = accumulator.engine.mixed_precision
    if precision != "no":
        meaning += (
            f", by root mean square within {margin:g} times what one big batch in {precision} is "
            f"off ({tolerance / margin:.1e})"
        )
    worst = max(windows, key=lambda m: m.error / (m.peer_error or 1.0))
    otherwise = f"the gradient is not the big batch's; most of the difference is in {worst.worst}"
    lines = window_lines(errors, of_peer, precision)
    return measured(name, error, tolerance, meaning, otherwise, lines)


def _loss_check(found: Sequence[Measurement], accumulator: Accumulator) -> Check:
    error, tolerance = error_and_tolerance(
        [m.loss_error for m in found],
        [m.peer_loss_error for m in found],
        precision_margin(accumulator.engine),
    )
    meaning = "the loss that is logged is the big batch's mean over its targets"
    return measured("logged loss", error, tolerance, meaning)


def _exchange_check(found: Sequence[Measurement], accumulator: Accumulator) -> Check:
    name, policy = "gradient exchanges", accumulator.engine.grad_sync
    if accumulator.engine.world_size == 1:
        return Check(name, INFO, "one rank: nothing is exchanged")
    if not any(m.exchanges for m in found):
        meaning = f"not counted on {accumulator.engine.name}; grad_sync={policy} is in force"
        return Check(name, INFO, meaning)
    wrong = [m for m in found if m.exchanges != m.expected_exchanges]
    if wrong:
        meaning = (
            f"{wrong[0].exchanges} exchanges in one window, but grad_sync={policy} makes "
            f"{wrong[0].expected_exchanges}"
        )
        return Check(name, FAIL, meaning)
    most = max(m.exchanges for m in found)
    steps = accumulator.plan.gradient_accumulation_steps
    return Check(name, PASS, f"counted: {most} per window (grad_sync={policy}, K={steps})")


def _equality_check(found: Sequence[Measurement], ranks: int) -> Check:
    name = "equal weights"
    unequal = sorted({parameter for m in found for parameter in m.unequal})
    if unequal:
        names = ", ".join(unequal[:3])
        return Check(name, FAIL, f"after an update the ranks hold different weights of {names}")
    if ranks == 1:
        return Check(name, INFO, "one rank only")
    meaning = f"all weights are equal to the bit on {ranks} ranks after each update"
    return Check(name, PASS, meaning)


def _clip_check(found: Sequence[Measurement], max_grad_norm: float | None) -> Check:
    errors, of_peer = [m.norm_error for m in found], [m.peer_error for m in found]
    error, tolerance = error_and_tolerance(errors, of_peer)
    largest = max(m.norm for m in found)
    if max_grad_norm is None:
        meaning = f"no clipping: the optimizer is given the big batch's norm (up to {largest:.3g})"
    elif largest > max_grad_norm:
        meaning = (
            f"norm {largest:.3g} is reported as the big batch's and clipped once, to "
            f"{max_grad_norm:g}"
        )
    else:
        meaning = (
            f"the big batch's norm is reported; at most {largest:.3g}, it never reaches "
            f"max_grad_norm={max_grad_norm:g}"
        )
    otherwise = (
        "the norm reported, or that of the gradient given to the optimizer, is not the "
        "big batch's clipped once"
    )
    return measured("norm and clipping", error, max(tolerance, NORM_TOLERANCE), meaning, otherwise)
