"""`causal_lm_loss`: the next-token loss as a sum over targets.

A sum can be split anywhere: the accumulator multiplies each micro-batch's sum by one weight, so
that the window's gradient is the mean over all its targets. Nothing here divides. Knows no engine
and no window.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from accum_trainer.batch import IGNORE, is_packed, version_of
from accum_trainer.errors import DataError
from accum_trainer.losses.head import summed_loss
from accum_trainer.losses.packing import without_cache
from accum_trainer.losses.targets import labels_on_host


@dataclass(frozen=True)
class SummedLoss:
    """A loss computed here: a sum over the shifted `labels`, unless it was changed since.

    Attributes:
        loss: held weakly, so that no graph is kept alive.
        version: of the loss tensor; a change in place raises it.
        labels: as the loss received them.
    """

    loss: weakref.ReferenceType[torch.Tensor]
    version: int
    labels: torch.Tensor


# The last ones, which `summed_here` recognises.
_made: deque[SummedLoss] = deque(maxlen=4)


def causal_lm_loss(
    model: torch.nn.Module, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> torch.Tensor:
    """Summed next-token cross-entropy of a causal language model on one micro-batch.

    Runs `model` on everything in `batch` but the labels and computes the loss from its logits, so
    the model's own reduction does not matter. Position t predicts label t + 1; the first label of a
    row is no target. If the model allows it, logits are computed only where there are targets, and
    few at a time: see `head`. A packed row is run without a cache, since transformers ignores
    restarting positions if there is one.

    Args:
        model: returns logits of shape (samples, tokens, vocabulary), as an attribute `logits` or as
            its output.
        batch: `input_ids` and `labels`, shape (samples, tokens), int64; labels of -100 are no
            targets.
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.

    Returns:
        A scalar, float32 (float64 from float64 logits): the sum over `causal_lm_targets(batch)`
        targets; 0 with a graph if there is none.

    Raises:
        DataError: the labels or the model do not predict a next token, or the logits are not at the
            positions of the labels.
    """
    _check(model, batch)
    # Shift the labels, not the logits: a slice of the logits would copy the largest tensor.
    targets = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if is_packed(batch):
        inputs = without_cache(model, inputs)
    positions = _positions(batch["labels"])
    loss = summed_loss(model, inputs, targets, label_smoothing, positions)
    _made.append(SummedLoss(weakref.ref(loss), version_of(loss), batch["labels"]))
    return loss


def _positions(labels: torch.Tensor) -> torch.Tensor | None:
    """Indices into the flattened targets that have one, made on the host: found on a GPU, the host
    would wait for their number. None if the host does not have the labels."""
    host = labels_on_host(labels)
    if host is None or host.shape != labels.shape:
        return None
    has_target = np.zeros(host.shape, dtype=bool)
    np.not_equal(host[:, 1:], IGNORE, out=has_target[:, :-1])
    found = torch.from_numpy(np.flatnonzero(has_target))
    if labels.device.type == "cuda":
        found = found.pin_memory()  # else the copy waits
    return found.to(labels.device, non_blocking=True)


def _check(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise a DataError if nothing here predicts a next token; later errors are less clear."""
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
    """The record of this very tensor if `causal_lm_loss` returned it and it is unchanged."""
    return next((m for m in _made if m.loss() is loss and m.version == version_of(loss)), None)
