"""Counts of any batch (tensors, samples, tokens), and a batch split in two.

Knows transformers' keys of packed samples, but no model and no window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from accum_trainer.errors import DataError

Batch = Any
# A label that is no target: cross-entropy's ignore_index.
IGNORE = -100
# Optional inputs of transformers' models besides `position_ids`: the samples' ends, for flash and
# linear attention, and the sample of each token, for convolutions and state-space layers.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def first_tensor(batch: Batch) -> torch.Tensor | None:
    """The first tensor of a batch, or None."""
    return next(tensors_of(batch), None)


def tensors_of(batch: Batch) -> Iterator[torch.Tensor]:
    """The tensors of a batch: a tensor, a mapping, a sequence or a data class of them."""
    if isinstance(batch, torch.Tensor):
        yield batch
        return
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    elif hasattr(batch, "__dict__"):
        values = vars(batch).values()
    for value in values:
        yield from tensors_of(value)


def num_samples(batch: Batch) -> int:
    """Samples of a batch: the first dimension of its first tensor, or 1 without a tensor.

    In a packed row, each 0 in `position_ids` starts a sample.
    """
    if isinstance(batch, Mapping) and is_packed(batch):
        return int((batch["position_ids"] == 0).sum())
    tensor = first_tensor(batch)
    return 1 if tensor is None or tensor.ndim == 0 else int(tensor.shape[0])


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether the samples lie end to end in one row, each with positions that start at 0."""
    positions = batch.get("position_ids")
    return (
        isinstance(positions, torch.Tensor)
        and positions.shape[0] == 1
        and "attention_mask" not in batch
    )


def num_tokens(batch: Batch) -> tuple[int, int]:
    """(tokens, positions) of a batch's `input_ids`, without and with padding; (0, 0) without it."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, torch.Tensor) else ids.numel(), ids.numel()


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 in inference mode, which does not count."""
    # Autograd counts changes in place under this name only.
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def halve(batch: Batch) -> tuple[Batch, Batch]:
    """Split a micro-batch's samples in two; of an odd number, the first half has one more.

    Tensors, and lists with one entry per sample, are split along their first dimension. A value
    without samples (a number, a tensor of first dimension 1) goes to both halves. A packed row is
    split at the start of a sample, the nearest to the middle, and its boundaries are recomputed.

    Raises:
        DataError: there is one sample, or a tensor whose first dimension is not the samples.
    """
    if isinstance(batch, Mapping) and is_packed(batch):
        return _halve_row(batch)
    size = num_samples(batch)
    if size < 2:
        raise DataError("it holds one sample")
    middle = -(-size // 2)
    return _taken("the batch", batch, size, slice(0, middle)), _taken(
        "the batch", batch, size, slice(middle, size)
    )


def num_positions(batch: Batch) -> int:
    """Size of a batch's computation: positions of its `input_ids`, padding included.

    Without `input_ids`, the numbers in its first tensor.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    tensor = ids if isinstance(ids, torch.Tensor) else first_tensor(batch)
    return 0 if tensor is None else tensor.numel()


def _taken(name: str, value: Any, size: int, part: slice) -> Any:
    """The samples `part` of `value`, which belongs to a batch of `size` samples.

    Raises:
        DataError: naming `name`, whose first dimension is not the samples.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] != size:
            raise DataError(
                f"{name} of shape {tuple(value.shape)} does not begin with the {size} samples"
            )
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
        vars(taken).update(
            {key: _taken(key, entry, size, part) for key, entry in vars(value).items()}
        )
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
            raise DataError(
                f"{key} of shape {tuple(value.shape)} does not lie along the {length} positions of "
                "the row"
            )
        halves[0][key] = value[:, :middle] if is_tensor else value
        halves[1][key] = value[:, middle:] if is_tensor else value
    return halves


def boundaries_of(
    lengths: Sequence[int], names: Sequence[str] = BOUNDARIES
) -> dict[str, torch.Tensor | int]:
    """The boundaries of samples laid end to end in one row, under transformers' names.

    Args:
        lengths: tokens of each sample.
        names: the entries to return.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k` of shape (samples + 1,), and `seq_idx` of shape (1,
        tokens), int32; `max_length_q` and `max_length_k` as plain ints, so that no kernel waits for
        the device.
    """
    sizes = torch.tensor(lengths, dtype=torch.int32)
    ends = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    number = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(sizes).unsqueeze(0)
    longest = max(lengths)
    known: dict[str, torch.Tensor | int] = dict(
        zip(BOUNDARIES, (ends, ends, longest, longest, number), strict=True)
    )
    return {name: known[name] for name in names}
