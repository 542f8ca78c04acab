"""Losses as sums over targets, and the count of targets they sum over.

A sum can be cut anywhere: the accumulator multiplies each micro-batch's sum by one weight that makes the window's
gradient the mean over all its targets. Nothing here divides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from accum_trainer.data.tokenizing import IGNORE
from accum_trainer.errors import DataError
from accum_trainer.head import summed_loss


def causal_lm_loss(model: torch.nn.Module, batch: Mapping[str, Any], label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed next-token cross-entropy of a causal language model on one micro-batch.

    Runs `model` on everything in `batch` but the labels and takes the loss from its logits, so it does not matter
    what the model itself would average over. Position t predicts label t + 1; the first label of a row is no target.
    Logits are made only where there are targets, and few at a time, where the model allows it: see `head`.

    Args:
        model: returns logits of shape (samples, tokens, vocabulary), as an attribute `logits` or as its output.
        batch: `input_ids` and `labels`, shape (samples, tokens), int64; labels of -100 are no targets.
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.

    Returns:
        A scalar, float32 (float64 from float64 logits): the sum over `causal_lm_targets(batch)` targets; 0 with a graph where there is none.
    """
    # Shift the labels, not the logits: a slice of the logits would be a second copy of the largest tensor there is.
    targets = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return summed_loss(model, inputs, targets, label_smoothing)


def causal_lm_targets(batch: Any) -> int:
    """Count what `causal_lm_loss` sums over: the labels of `batch` after the shift that are not -100.

    Labels of one dimension (one class per sample) are counted as they stand.

    Raises:
        DataError: the batch has no integer `labels`, so somebody has to say how to count.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim == 0:
        have = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        raise DataError(
            f"cannot count the targets of a batch with {have}: no integer `labels`; "
            "pass count_targets=function(batch) -> number of terms that your loss sums or averages over"
        )
    counted = labels[..., 1:] if labels.ndim > 1 else labels
    return int((counted != IGNORE).sum())
