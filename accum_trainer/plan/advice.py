"""Advice on the effective batch from the noise scale, for people. Numbers in, one line out; knows
no run and no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Noise scales. A batch of two makes 1 + 1/2 of the fewest updates possible: doubling it once more
# saves a sixth of them for twice the samples each (McCandlish et al. 2018, equation 2.11).
_ENOUGH = 2.0


def advice_of_run(plan: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    """`batch_size_advice` from a run's plan.json and one of its records."""
    by_tokens = plan["max_tokens_per_micro_batch"] is not None
    return batch_size_advice(
        record.get("noise_scale"),
        record.get("noise_scale_low"),
        record.get("noise_scale_high"),
        global_batch_size=plan["effective_batch_size"],
        micro_batch_size=None if by_tokens else plan["physical_batch_size"],
        world_size=plan["world_size"],
    )


def why_unknown(plan: Mapping[str, Any]) -> str:
    """What to say of a run for which `advice_of_run` has nothing to say, from its plan.json."""
    every = plan["noise_every"]
    if every == 0:
        return "noise scale not measured: noise_every=0; --noise-every auto measures it"
    often = "every window" if every == 1 else f"one window in {every}"
    return (
        f"noise scale not known yet: {often} is measured, and the gradient does not stand out of "
        "the noise so far"
    )


def batch_size_advice(
    noise_scale: float | None,
    low: float | None,
    high: float | None,
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
) -> str | None:
    """Compare the effective batch with the noise scale, in words; None while nothing is known.

    Args:
        noise_scale, low, high: in samples, as in a record; None if unknown.
        micro_batch_size: B; None if micro-batches are sized by tokens.
    """
    if noise_scale is None or low is None or high is None:
        if low is None or low < global_batch_size:
            return None
        return (
            f"noise scale above {_rounded(low)} samples: B_eff {global_batch_size} is noisy; "
            "how much larger it should be is not known yet"
        )
    found = (
        f"noise scale about {_rounded(noise_scale)} samples ({_rounded(low)} to {_rounded(high)})"
    )
    enough = _ENOUGH * noise_scale
    if global_batch_size < low:
        return (
            f"{found}: B_eff {global_batch_size} is noisy, beyond about {_rounded(enough)} little "
            f"is gained; {_reached(noise_scale, micro_batch_size, world_size)}"
        )
    if global_batch_size > _ENOUGH * high:
        return (
            f"{found}: B_eff {global_batch_size} is more than this model can use now, beyond about "
            f"{_rounded(enough)} little is gained; "
            f"{_reached(enough, micro_batch_size, world_size)}"
        )
    return (
        f"{found}: B_eff {global_batch_size} suits it, beyond about {_rounded(enough)} little is "
        "gained"
    )


def _reached(samples: float, micro_batch_size: int | None, world_size: int) -> str:
    """How an effective batch of about `samples` is had on this machine."""
    if micro_batch_size is None:
        return f"--global-batch-size {_rounded(samples)} would do on this machine"
    k = max(1, math.ceil(samples / (micro_batch_size * world_size) - 0.25))
    size = k * micro_batch_size * world_size
    return f"K = {k} (B_eff {size}) would do on this machine"


def _rounded(samples: float) -> str:
    """Two digits: more would say more than is known."""
    if samples < 10:
        return f"{samples:.1f}".removesuffix(".0")
    digits = 1 - math.floor(math.log10(samples))
    return f"{round(samples, digits):.0f}"
