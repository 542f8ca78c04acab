"""Ways to count the terms that a loss sums or averages over, from a batch alone.

A mean times this count is a sum, and only a sum lets a window be split anywhere. Does not know
which way holds for a model: `objective` proves it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accum_trainer.batch import IGNORE, Batch, num_samples, version_of
from accum_trainer.errors import DataError

# Number of terms that a batch's loss sums over; the sum of their weights if the loss has weights.
CountTargets = Callable[[Batch], float]


@dataclass(frozen=True)
class Counting:
    """One way to count targets.

    Attributes:
        name: as it appears in records, such as `shifted labels`.
        count: batch -> number of terms.
        reads_labels: a label set to `ignore` does not count.
        ignore: the label that marks no target.
    """

    name: str
    count: CountTargets
    reads_labels: bool = False
    ignore: int = IGNORE


def causal_lm_targets(batch: Any) -> int:
    """Count the terms of `causal_lm_loss`: the labels after the shift that are not -100.

    Labels of one dimension (one class per sample) are counted without a shift.

    Raises:
        DataError: the batch has no integer `labels`.
    """
    labels = _integer_labels(batch)
    counted = labels[..., 1:] if labels.ndim > 1 else labels
    return int((counted != IGNORE).sum())


SHIFTED = Counting("shifted labels", causal_lm_targets, reads_labels=True)


def countings_of(batch: Batch, ignore: int = IGNORE) -> Iterator[Counting]:
    """The ways in which a model's own loss may count this batch, the most likely first.

    Args:
        batch: a micro-batch with labels.
        ignore: the label that this model's loss leaves out.

    Raises:
        DataError: the batch has no labels that any way can read.
    """
    if _has(batch, "start_positions", "end_positions") and not _has(batch, "labels"):
        yield Counting("answers", _answers)
        return
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim > 0:
        yield Counting("label values", lambda batch: batch["labels"].numel())
        return
    labels = _integer_labels(batch)
    if labels.ndim > 1 and labels.shape[-1] > 1:
        yield SHIFTED
    yield Counting("labels", lambda batch: int((batch["labels"] != ignore).sum()), True, ignore)
    if labels.ndim > 1:  # one term per sample, with any number of labels (a CTC loss)
        yield Counting("samples", lambda batch: num_samples(batch))


# Keys of the targets in a batch of transformers.
_COUNTED = ("labels", "start_positions", "end_positions")


def targets_in(batch: Batch) -> dict[str, tuple[torch.Tensor, int]]:
    """The tensors that hold a batch's targets, each with its version, which a change raises."""
    if not isinstance(batch, Mapping):
        return {}
    found = {key: batch.get(key) for key in _COUNTED}
    return {key: (t, version_of(t)) for key, t in found.items() if isinstance(t, torch.Tensor)}


@dataclass(frozen=True)
class _Moved:
    """Labels on the device and the host's tensor that they were copied from."""

    labels: weakref.ReferenceType[torch.Tensor]
    version: int
    host: torch.Tensor


# Of the last micro-batches, for `labels_on_host`.
_moved: deque[_Moved] = deque(maxlen=4)


def note_move(host: Batch, batch: Batch) -> None:
    """Remember that `batch`, on the device, is a copy of `host` (or is the same)."""
    if isinstance(host, Mapping) and isinstance(batch, Mapping):
        before, labels = host.get("labels"), batch.get("labels")
        if not isinstance(before, torch.Tensor) or not isinstance(labels, torch.Tensor):
            return
        if before.device.type == "cpu":
            _moved.append(_Moved(weakref.ref(labels), version_of(labels), before))


def labels_on_host(labels: torch.Tensor) -> np.ndarray | None:
    """The values of these labels without waiting for the device; None if they came otherwise, or
    were changed since."""
    for moved in _moved:
        if moved.labels() is labels and moved.version == version_of(labels):
            values: np.ndarray = moved.host.detach().numpy()
            return values
    return None


def _answers(batch: Batch) -> int:
    """Count answer spans inside the text; transformers ignores a position beyond it.

    Raises:
        DataError: unequal numbers of starts and ends lie inside, so that one count cannot weigh
            both terms.
    """
    length = next(batch[key].shape[1] for key in ("input_ids", "inputs_embeds") if key in batch)
    starts, ends = (int((batch[f"{end}_positions"] < length).sum()) for end in ("start", "end"))
    if starts != ends:
        raise DataError(
            f"{starts} start_positions and {ends} end_positions lie inside the {length} tokens of "
            "a batch, and the model's loss is a mean over each: it cannot be split exactly; mark "
            "an answer outside the text in both, or in neither"
        )
    return starts


def _integer_labels(batch: Any) -> torch.Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.ndim > 0:
        return labels
    is_mapping = isinstance(batch, Mapping)
    have = f"the keys {sorted(map(str, batch))}" if is_mapping else f"type {type(batch).__name__}"
    raise DataError(
        f"cannot count the targets of a batch with {have}: no integer `labels`; "
        "add labels (for a causal model a copy of input_ids, -100 for what is not to be learned), "
        "or pass count_targets=function(batch) -> terms that your loss sums or averages over"
    )


def _has(batch: Batch, *keys: str) -> bool:
    return isinstance(batch, Mapping) and all(isinstance(batch.get(k), torch.Tensor) for k in keys)
