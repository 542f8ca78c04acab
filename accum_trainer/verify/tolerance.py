"""How near an update must come to the float64 big batch.

In float32 the tolerance is fixed. In 16 bits even one big batch is off, by an amount that depends
on the model and the rows. That error is measured on the same rows (`low_precision_peer`), and the
root mean square over several windows may exceed it by a small margin only. Knows no loop: the
checks of a training and of a user's loop both use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from accum_trainer.engine.base import Engine
from accum_trainer.verify.big_batch import BigBatch, Row, Truth, relative_error

# Relative error of a float32 gradient: one float32 big batch is itself 3e-7 to 9e-7 off.
FLOAT32_TOLERANCE = 2e-6
# Allowed ratio of the windows' root mean square error to that of one big batch in the same 16-bit
# precision. Rounding differs with every cut. Measured over 4 windows in bf16, whole ones and tails:
# 0.95 to 1.02 on one process, DDP and FSDP2 (26 trainings), 1.00 to 1.09 on ZeRO 1 to 3 (12), which
# rounds once more when it sums the ranks' gradients.
PRECISION_MARGIN, ZERO_PRECISION_MARGIN = 1.1, 1.25
# The same for windows in which one row is far longer than the others. Right loops in bf16 were
# measured at 1.005 to 1.131 over 4 windows (one process and DDP, 6 seeds each), 3 of 12 above 1.1;
# why is not known. A loop that cuts rows was 80 percent off.
LONG_ROW_MARGIN = 1.25
# Windows of each kind that are run in 16 bits, at least: single ones were measured at up to 1.16
# (ZeRO: 1.14), four together, by root mean square, at up to 1.07.
LOW_PRECISION_WINDOWS = 4


def precision_margin(engine: Engine) -> float:
    return ZERO_PRECISION_MARGIN if engine.rounds_reduced_gradients else PRECISION_MARGIN


def low_precision_peer(
    engine: Engine, make_plain: Callable[[], torch.nn.Module]
) -> BigBatch | None:
    """One process's big batch in the engine's 16-bit precision; None in float32."""
    if engine.mixed_precision not in ("bf16", "fp16"):
        return None
    dtype = torch.bfloat16 if engine.mixed_precision == "bf16" else torch.float16
    scale = 1.0 if dtype == torch.bfloat16 else 1024.0
    if engine.autocasts:
        return BigBatch(make_plain(), torch.float32, engine.device, autocast=dtype, scale=scale)
    # Sharding engines cast the weights instead of using autocast.
    return BigBatch(make_plain(), dtype, engine.device, scale=scale)


def peer_errors(
    peer: BigBatch | None, weights: Mapping[str, torch.Tensor], rows: Sequence[Row], truth: Truth
) -> tuple[float | None, float | None]:
    """Relative errors of one big batch in `peer`: (its gradient, its loss); None without a peer.

    Errors of single rows can cancel in a sum by chance, so the loss error sums their absolute
    values.
    """
    if peer is None:
        return None, None
    peer.load(weights)
    one = peer.truth_of_one_batch(rows)
    error = relative_error(one.mean_gradient, truth.mean_gradient)
    return error, float((one.row_losses - truth.row_losses).abs().sum() / truth.row_losses.sum())


def error_and_tolerance(
    errors: Sequence[float], of_peer: Sequence[float | None], margin: float = PRECISION_MARGIN
) -> tuple[float, float]:
    """(error, tolerance) of several windows together.

    In float32 the largest error; in 16 bits the root mean square, and as tolerance `margin` times
    the root mean square of the peer's errors. nan stays nan.
    """
    known = [error for error in of_peer if error is not None]
    if not known:
        return (math.nan if any(map(math.isnan, errors)) else max(errors)), FLOAT32_TOLERANCE
    return _root_mean_square(errors), max(FLOAT32_TOLERANCE, margin * _root_mean_square(known))


def window_lines(
    errors: Sequence[float], of_peer: Sequence[float | None], precision: str
) -> tuple[str, ...]:
    """One line per window in 16 bits: its error beside that of one big batch."""
    return tuple(
        f"window {i}: {error:.2e} off, one big batch in {precision} {known:.2e}, "
        f"{error / (known or math.inf):.3f} times"
        for i, (error, known) in enumerate(zip(errors, of_peer, strict=True), start=1)
        if known is not None
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))
