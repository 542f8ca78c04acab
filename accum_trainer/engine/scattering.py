"""Weights that rank 0 alone has loaded reach the shards of all ranks, one parameter at a time.

The other ranks build their model on the meta device. Rank 0 lets go of each parameter as it is
dealt out, so that the processes of a machine hold one whole model at most, all together. Knows
`fully_shard`'s sharded parameters, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from accum_trainer.engine.mesh import ShardMesh
from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import EngineError


def is_on_meta(model: torch.nn.Module) -> bool:
    """Whether the model has shapes and no weights."""
    return any(p.is_meta for p in model.parameters())


def signature_of(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Names, shapes and dtypes of the weights and buffers: equal if one model can be filled with
    the weights of the other."""
    return [
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]


class Whole:
    """The weights of a model that rank 0 has whole, taken out of it to be dealt to its shards.

    Afterwards the model is on the meta device on every rank.

    Args:
        ranks: this process among the others; collective.
        model: whole on rank 0, on the meta device elsewhere.

    Raises:
        EngineError: on all ranks, if it is not, or not the same model.
    """

    def __init__(self, ranks: Ranks, model: torch.nn.Module) -> None:
        ranks.agree(_wrong_place(ranks, model))
        signatures = ranks.gather_objects(signature_of(model))
        for rank, signature in enumerate(signatures):
            for first, other in zip_longest(signatures[0], signature):
                if first != other:
                    raise EngineError(
                        f"the model of process {rank} is another than that of process 0: {other} "
                        f"instead of {first}; build the same model on all processes"
                    )
        self._ranks = ranks
        self._weights = dict(model.named_parameters()) if ranks.is_main else {}
        self._others = dict(_other_tensors(model)) if ranks.is_main else {}
        on_meta: dict[int, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in on_meta:
                    empty = p.detach().to("meta")
                    on_meta[id(p)] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)
                setattr(module, name, on_meta[id(p)])  # tied weights stay one

    def deal(self, model: torch.nn.Module, mesh: ShardMesh, home: torch.device) -> None:
        """Fill the model, sharded over `mesh` since, with shards that lie in `home`. Collective."""
        device = self._ranks.device
        model.to_empty(device=home)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor)
            whole = self._weights.pop(name, None)
            with torch.no_grad():
                _scatter(p.to_local(), p.shape, whole, self._ranks, mesh.shard_size)
            if whole is not None:
                whole.data = torch.empty(0)  # an optimizer may still hold it
        others = self._ranks.first_of(
            {n: t.cpu() for n, t in self._others.items()} if self._ranks.is_main else None
        )
        modules = dict(model.named_modules())
        for (module, name), tensor in others.items():
            setattr(modules[module], name, tensor.to(device))


def _other_tensors(model: torch.nn.Module) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """Buffers, and tensors that modules hold as plain attributes, by module and name."""
    for prefix, module in model.named_modules():
        held = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                yield (prefix, name), value


def _wrong_place(ranks: Ranks, model: torch.nn.Module) -> EngineError | None:
    if ranks.is_main and is_on_meta(model):
        return EngineError(
            "the model is on the meta device on process 0, which has to load its weights for all"
        )
    if not ranks.is_main and not all(p.is_meta for p in model.parameters()):
        return EngineError(
            f"the model of process {ranks.rank} is not on the meta device while others' are; "
            "build it under `with torch.device('meta')` on all processes but 0, or on none"
        )
    return None


def _scatter(
    mine: torch.Tensor,
    shape: torch.Size,
    whole: torch.Tensor | None,
    ranks: Ranks,
    shard_size: int,
) -> None:
    """Fill this rank's rows of a parameter that each group of `shard_size` ranks shards along its
    first dimension, as `torch.chunk` cuts it: the last ranks may have fewer rows, or none."""
    rows = math.ceil(shape[0] / shard_size)
    received = torch.empty(rows, *shape[1:], dtype=mine.dtype, device=ranks.device)
    parts = None
    if ranks.is_main:
        assert whole is not None
        parts = [torch.zeros_like(received) for _ in range(ranks.world_size)]
        for rank, part in enumerate(parts):
            place = rank % shard_size
            own = whole.detach()[place * rows : (place + 1) * rows]
            part[: len(own)].copy_(own)
    dist.scatter(received, parts, src=0)
    mine.copy_(received[: len(mine)])
