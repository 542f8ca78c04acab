"""Losses as sums over targets, and the count of targets they sum over.

A sum can be cut anywhere: the accumulator multiplies each micro-batch's sum by one weight that
makes the window's gradient the mean over all its targets. Nothing here divides.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from accum_trainer.batch import IGNORE, is_packed, version_of
from accum_trainer.errors import DataError
from accum_trainer.losses.head import summed_loss
from accum_trainer.losses.packing import without_cache


@dataclass(frozen=True)
class SummedLoss:
    """A loss that was made here: a sum over the shifted `labels`, as long as it is unchanged.

    Attributes:
        loss: weakly, so that no graph is kept alive.
        version: of the loss; changed in place it is another number.
        labels: as the loss was given them.
    """

    loss: weakref.ReferenceType[torch.Tensor]
    version: int
    labels: torch.Tensor


# The last ones, so that `summed_here` knows one again.
_made: deque[SummedLoss] = deque(maxlen=4)


def causal_lm_loss(
    model: torch.nn.Module, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> torch.Tensor:
    """Summed next-token cross-entropy of a causal language model on one micro-batch.

    Runs `model` on everything in `batch` but the labels and takes the loss from its logits, so it
    does not matter what the model itself would average over. Position t predicts label t + 1; the
    first label of a row is no target. Logits are made only where there are targets, and few at a
    time, where the model allows it: see `head`. A packed row is run without a cache, which would
    hide from transformers where its samples begin.

    Args:
        model: returns logits of shape (samples, tokens, vocabulary), as an attribute `logits` or as
            its output.
        batch: `input_ids` and `labels`, shape (samples, tokens), int64; labels of -100 are no
            targets.
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.

    Returns:
        A scalar, float32 (float64 from float64 logits): the sum over `causal_lm_targets(batch)`
        targets; 0 with a graph where there is none.
    """
    _check(model, batch)
    # Shift the labels, not the logits: a slice of the logits would be a second copy of the largest
    # tensor there is.
    targets = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if is_packed(batch):
        inputs = without_cache(model, inputs)
    loss = summed_loss(model, inputs, targets, label_smoothing)
    _made.append(SummedLoss(weakref.ref(loss), version_of(loss), batch["labels"]))
    return loss


def _check(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise a DataError for what predicts no next token; it would fail later in other words."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.is_floating_point():
        have = (
            f"shape {tuple(labels.shape)}, {labels.dtype}"
            if isinstance(labels, torch.Tensor)
            else "none"
        )
        raise DataError(
            "causal_lm_loss predicts the next token and needs integer labels of shape (samples, "
            f"tokens); this batch has {have}. Pass model(**batch).loss to acc.backward() instead"
        )
    config = getattr(getattr(model, "module", model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            "causal_lm_loss predicts the next token, and this model is an encoder-decoder, whose "
            "labels are not shifted; pass model(**batch).loss to acc.backward() instead"
        )


def summed_here(loss: torch.Tensor) -> SummedLoss | None:
    """What `causal_lm_loss` made this very tensor of, if it did and the tensor is unchanged."""
    return next((m for m in _made if m.loss() is loss and m.version == version_of(loss)), None)
