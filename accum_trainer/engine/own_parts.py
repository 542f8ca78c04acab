"""What each rank writes into a checkpoint: contiguous parts of tensors, together each element once.

A part names its tensor, its first element in row-major order and the tensor's shape, so whoever
reads them needs no engine and no number of processes. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    @property
    def numel(self) -> int:
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def on_host(self) -> Part:
        """A copy that later updates do not change; from a GPU into pinned memory, whose copy the
        caller waits for with `torch.cuda.synchronize`."""
        source = self.values.detach()
        copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        copy.copy_(source, non_blocking=True)
        return Part(self.tensor, self.shape, self.begin, copy)


@dataclass(frozen=True)
class StoredPart:
    """A `Part` that lies elsewhere, such as in a file.

    Attributes:
        numel, dtype: of its values.
        read: gives the values, shape (numel,).
    """

    tensor: str
    shape: tuple[int, ...]
    begin: int
    numel: int
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def values(self) -> torch.Tensor:
        return self.read()


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


class WholeTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each put together from its parts when it is asked for: of parts in files
    (`StoredPart`), one tensor at a time is in memory.

    Raises:
        ValueError: an element of a tensor is missing or there twice, or parts differ in its shape
            or dtype.
    """

    def __init__(self, parts: Iterable[Part | StoredPart]) -> None:
        self._parts: dict[str, list[Part | StoredPart]] = {}
        for part in parts:
            self._parts.setdefault(part.tensor, []).append(part)
        for name, held in self._parts.items():
            held.sort(key=lambda part: (part.begin, part.numel))
            shape, dtype, end = held[0].shape, held[0].dtype, 0
            for part in held:
                if part.shape != shape or part.dtype != dtype:
                    raise ValueError(f"parts of {name} do not belong together")
                if part.begin != end:
                    raise ValueError(f"the parts of {name} are not the whole tensor")
                end += part.numel
            if end != math.prod(shape):
                raise ValueError(f"the parts of {name} are not the whole tensor")

    def __getitem__(self, name: str) -> torch.Tensor:
        held = self._parts[name]
        found = torch.empty(held[0].shape, dtype=held[0].dtype)
        for part in held:
            found.view(-1)[part.begin : part.begin + part.numel] = part.values
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return self._parts[name][0].shape

    def below(self, prefix: str) -> dict[str, NamedTensors]:
        """Of names `prefix/<x>/<key>`: x -> its tensors by key. x may have slashes itself."""
        found: dict[str, dict[str, str]] = {}
        for name in self._parts:
            kind, _, rest = name.partition("/")
            if kind == prefix:
                x, _, key = rest.rpartition("/")
                found.setdefault(x, {})[key] = name
        return {x: NamedTensors(self, names) for x, names in found.items()}

    def named(self, prefix: str) -> NamedTensors:
        """Those whose name is `prefix/<x>`, by x."""
        begin = f"{prefix}/"
        names = {name.removeprefix(begin): name for name in self._parts if name.startswith(begin)}
        return NamedTensors(self, names)


class NamedTensors(Mapping[str, torch.Tensor]):
    """Some of the tensors, under other names.

    Args:
        tensors: read when one is asked for.
        names: new name -> name in `tensors`.
    """

    def __init__(self, tensors: WholeTensors, names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {new: self._tensors.shape(name) for new, name in self._names.items()}
