"""What can be read off any batch: its first tensor, its samples, its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

Batch = Any


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
    """Samples of a batch: the first dimension of its first tensor (1 where it has none); where they lie end to end in one
    row, as many as `position_ids` begin anew."""
    if isinstance(batch, Mapping) and is_packed(batch):
        return int((batch["position_ids"] == 0).sum())
    tensor = first_tensor(batch)
    return 1 if tensor is None or tensor.ndim == 0 else int(tensor.shape[0])


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether the samples lie end to end in one row, each with positions that begin at 0."""
    positions = batch.get("position_ids")
    return isinstance(positions, torch.Tensor) and positions.shape[0] == 1 and "attention_mask" not in batch


def num_tokens(batch: Batch) -> tuple[int, int]:
    """(tokens, positions) of a batch's `input_ids`: without and with padding; (0, 0) where it has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, torch.Tensor) else ids.numel(), ids.numel()


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 of one made in inference mode, which keeps no count."""
    return 0 if tensor.is_inference() else tensor._version
