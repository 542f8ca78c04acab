"""What each rank writes into a checkpoint: contiguous parts of tensors, together each element once.

A part names its tensor, its first element in row-major order and the tensor's shape, so whoever
reads them needs no engine and no number of processes. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Part:
    """A contiguous part of a tensor.

    Attributes:
        tensor: `model/<name>`, or `optimizer/<name of the parameter>/<key of its state>`.
        shape: of the whole tensor.
        begin: index of the first element in the flattened tensor.
        values: shape (elements,).
    """

    tensor: str
    shape: tuple[int, ...]
    begin: int
    values: torch.Tensor

    def on_host(self) -> Part:
        """A copy that later updates do not change; from a GPU into pinned memory, whose copy the
        caller waits for with `torch.cuda.synchronize`."""
        source = self.values.detach()
        copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        copy.copy_(source, non_blocking=True)
        return Part(self.tensor, self.shape, self.begin, copy)


def weight_name(parameter: str) -> str:
    return f"{MODEL}/{parameter}"


def state_name(parameter: str, key: str) -> str:
    return f"{OPTIMIZER}/{parameter}/{key}"


def share_of(tensor: torch.Tensor, rank: int, world_size: int) -> tuple[int, torch.Tensor]:
    """(begin, values) of one rank's share of a tensor that all ranks have; a number is rank 0's."""
    flat = tensor.detach().reshape(-1)
    if tensor.ndim == 0:
        return 0, flat if rank == 0 else flat[:0]
    begin, end = (flat.numel() * r // world_size for r in (rank, rank + 1))
    return begin, flat[begin:end]


def whole_tensors(parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    """Tensors by name, from the parts of all ranks.

    Raises:
        ValueError: an element of a tensor is missing or there twice, or parts differ in its shape.
    """
    found: dict[str, torch.Tensor] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        name, end = part.tensor, part.begin + part.values.numel()
        if name not in found:
            found[name] = torch.empty(part.shape, dtype=part.values.dtype)
        if found[name].shape != part.shape or not 0 <= part.begin <= end <= math.prod(part.shape):
            raise ValueError(f"parts of {name} do not belong together")
        found[name].view(-1)[part.begin : end] = part.values
        ranges.setdefault(name, []).append((part.begin, end))
    for name, held in ranges.items():
        held.sort()
        ends = [0, *(end for _, end in held)]
        if ends[-1] != found[name].numel() or any(b != e for (b, _), e in zip(held, ends)):  # noqa: B905 - one more end
            raise ValueError(f"the parts of {name} are not the whole tensor")
    return found
