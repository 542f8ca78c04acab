"""When gradients are exchanged and weights gathered: with every micro-batch, or once per window.

The update is the same. Engines that shard pay for fewer exchanges with memory that is kept through
the window: a full local gradient, and the whole weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from accum_trainer.engine.memory import free_bytes
from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import ConfigError

AUTO, ONCE, EVERY = "auto", "once-per-window", "every-microbatch"
POLICIES = (AUTO, ONCE, EVERY)


@dataclass(frozen=True)
class Syncs:
    """The policies that are asked for, each one of `POLICIES`.

    Raises:
        ConfigError: another word.
    """

    grad_sync: str = AUTO
    weight_sync: str = AUTO

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value not in POLICIES:
                raise ConfigError(
                    f"{name}={value!r} is not known; give one of {', '.join(POLICIES)}"
                )


def gradient_bytes(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> int:
    """Memory of a full local gradient in `dtype`."""
    return dtype.itemsize * sum(numbers_of(p) for p in parameters if p.requires_grad)


def numbers_of(parameter: torch.Tensor) -> int:
    """Numbers of the whole parameter; one that ZeRO-3 has sharded is empty and knows its size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def choose_grad_sync(ranks: Ranks, gradient: int) -> tuple[str, str]:
    """(policy, reason): once per window if a full local gradient of that many bytes takes at most
    half of the free memory of the rank that has least. Collective."""
    free = _least_free(ranks)
    reason = f"a full local gradient takes {gradient / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    return (ONCE if gradient <= free / 2 else EVERY), reason


def choose_weight_sync(ranks: Ranks, weights: int, gradient: int, k: int) -> tuple[str, str]:
    """(policy, reason): once per window if that saves a gather and the whole weights fit into half
    of the free memory of the rank that has least, beside a gradient kept through the window.
    Collective.

    Args:
        weights, gradient: bytes; the gradient is 0 if it is not kept.
        k: micro-batches of a window.
    """
    if k == 1:
        return EVERY, "a window has one micro-batch"
    free = _least_free(ranks)
    beside = f" beside a gradient of {gradient / 1e9:.2f} GB" if gradient else ""
    reason = f"whole weights take {weights / 1e9:.2f} GB{beside}, {free / 1e9:.1f} GB are free"
    return (ONCE if weights + gradient <= free / 2 else EVERY), reason


def _least_free(ranks: Ranks) -> float:
    free = free_bytes(ranks.device)
    if ranks.device.type == "cpu":  # which the processes of a machine share
        free /= ranks.count_on_machine()
    return float(ranks.all_gather_floats([free])[:, 0].min())
