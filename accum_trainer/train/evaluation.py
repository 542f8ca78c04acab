"""The mean loss per target on held-out rows. Computes no gradient, so K does not enter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.train.setup import Training


class Evaluation:
    """Evaluates a training on its evaluation rows.

    Args:
        training: a training; without evaluation rows, nothing is ever due.
    """

    def __init__(self, training: Training) -> None:
        self._training = training

    def is_due(self, update: int) -> bool:
        """Whether to evaluate after `update`: at every `eval_every`-th, and at the end."""
        every = self._training.config.eval_every
        at_interval = every is not None and update % every == 0
        return self._training.data.evaluation is not None and (
            at_interval or self._training.is_done
        )

    def mean_loss(self, progress: Callable[[], None] = lambda: None) -> float:
        """Mean loss per target over all processes. Collective.

        Args:
            progress: called after each micro-batch.
        """
        training, engine = self._training, self._training.accumulator.engine
        rows = training.data.evaluation
        assert rows is not None
        cut, collate = training.prepared.cutting.cut, training.prepared.collate
        dealt = cut.assign_to_ranks(rows.lengths, engine.world_size)
        mine = dealt[engine.rank]
        # All ranks run the same number of forwards: an engine that shards weights gathers them in
        # each.
        idle = [np.array([0])] * (max(map(len, dealt)) - len(mine))
        batches = (
            engine.to_device(collate([rows[int(i)] for i in chosen])) for chosen in [*mine, *idle]
        )
        # Unwrapped: DDP's forward would exchange buffers.
        losses = micro_batch_losses(engine.unwrap(training.model), batches, progress)
        total = engine.all_gather_floats([sum(losses[: len(mine)])]).sum()
        return float(total / rows.num_targets.sum())


@torch.no_grad()
def micro_batch_losses(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    progress: Callable[[], None] = lambda: None,
) -> list[float]:
    """Summed loss of each micro-batch, dropout off; `model` is in train mode afterwards."""
    model.eval()
    losses = []
    for batch in batches:
        losses.append(causal_lm_loss(model, batch).double().item())
        progress()
    model.train()
    return losses
