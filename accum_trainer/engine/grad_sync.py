"""When gradients are exchanged: after every micro-batch, or once per window.

The gradient is the same. Engines that shard gradients pay for fewer exchanges with memory: a full
local gradient, kept through the window.
"""

from __future__ import annotations

import torch

from accum_trainer.engine.memory import free_bytes
from accum_trainer.engine.ranks import Ranks

ONCE, EVERY = "once-per-window", "every-microbatch"
GRAD_SYNCS = ("auto", ONCE, EVERY)


def choose_by_memory(ranks: Ranks, model: torch.nn.Module, dtype: torch.dtype) -> tuple[str, str]:
    """(policy, reason): once per window if a full local gradient in `dtype` takes at most half of
    the free memory of the rank that has least. Collective."""
    trained = (p for p in model.parameters() if p.requires_grad)
    # A parameter that ZeRO-3 has sharded is empty; `ds_numel` is its size.
    needed = dtype.itemsize * sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    free = float(ranks.all_gather_floats([free_bytes(ranks.device)])[:, 0].min())
    reason = f"a full local gradient takes {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    return (ONCE if needed <= free / 2 else EVERY), reason
