"""A micro-batch in two, where the device did not hold it whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from accum_trainer.data.collating import BOUNDARIES, boundaries_of
from accum_trainer.data.windows import Batch, first_tensor, is_packed, num_samples
from accum_trainer.errors import DataError


def halve(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of a micro-batch's samples; an odd one is in the first.

    Tensors are cut along their first dimension, and a list with one entry per sample is cut as they are. What has no
    samples of its own (a number, a tensor of first dimension 1) goes to both halves. Samples that lie end to end in one
    row are cut where `position_ids` begin anew, nearest to the middle, and their boundaries are made anew.

    Raises:
        DataError: there is one sample, or a tensor whose first dimension is not the samples.
    """
    if isinstance(batch, Mapping) and is_packed(batch):
        return _halve_row(batch)
    size = num_samples(batch)
    if size < 2:
        raise DataError("it holds one sample")
    middle = -(-size // 2)
    return _taken("the batch", batch, size, slice(0, middle)), _taken("the batch", batch, size, slice(middle, size))


def num_positions(batch: Batch) -> int:
    """What a batch costs to compute: positions of its `input_ids`, padding counted; else numbers in its first tensor."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    tensor = ids if isinstance(ids, torch.Tensor) else first_tensor(batch)
    return 0 if tensor is None else tensor.numel()


def _taken(name: str, value: Any, size: int, part: slice) -> Any:
    """The samples `part` of a batch of `size`, or of something in it called `name`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] != size:
            raise DataError(f"{name} of shape {tuple(value.shape)} does not begin with the {size} samples")
        return value[part]
    if isinstance(value, Mapping):
        taken: Any = copy.copy(value)
        for key in value:
            taken[key] = _taken(str(key), value[key], size, part)
        return taken
    if isinstance(value, (list, tuple)):
        if first_tensor(value) is None:
            return value[part] if len(value) == size else value
        entries = [_taken(f"{name}[{i}]", entry, size, part) for i, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if first_tensor(value) is not None:
        taken = copy.copy(value)
        vars(taken).update({key: _taken(key, entry, size, part) for key, entry in vars(value).items()})
        return taken
    return value


def _halve_row(batch: Mapping[str, Any]) -> tuple[Batch, Batch]:
    length = batch["position_ids"].shape[1]
    begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    if len(begins) < 2:
        raise DataError("it holds one sample")
    middle = min(begins[1:], key=lambda begin: abs(2 * begin - length))
    starts = sorted({0, *begins})
    lengths = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]
    cut = starts.index(middle)
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key, value in batch.items():
        if key in BOUNDARIES:
            for half, part in zip(halves, (lengths[:cut], lengths[cut:]), strict=True):
                made = boundaries_of(part, [key])[key]
                half[key] = made.to(value) if isinstance(made, torch.Tensor) else made
            continue
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        if is_tensor and tuple(value.shape[:2]) != (1, length):
            raise DataError(f"{key} of shape {tuple(value.shape)} does not lie along the {length} positions of the row")
        halves[0][key] = value[:, :middle] if is_tensor else value
        halves[1][key] = value[:, middle:] if is_tensor else value
    return halves
