"""Which processes share a shard of each weight: all of them, or groups that each hold the model.

Hybrid sharding is FSDP2 on a mesh of two dimensions. Processes of a group, those of a machine,
gather weights from each other; the groups are copies, which add their gradients up once per window.
Knows numbers of processes; no models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from accum_trainer.engine.request import Request, is_true
from accum_trainer.errors import ConfigError, EngineError

PARALLELISM_VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"
# Names of accelerate's `ParallelismConfig`. Processes along the others share a sample.
_REPLICATE, _SHARD = "dp_replicate_size", "dp_shard_size"
_SIZES = (_REPLICATE, _SHARD, "tp_size", "cp_size", "sp_size")


@dataclass(frozen=True)
class ShardMesh:
    """Where one process stands: ranks of a group follow each other.

    Attributes:
        rank, world_size: of this process among all.
        shard_size: processes of a group, which divides `world_size`.
    """

    rank: int
    world_size: int
    shard_size: int

    @property
    def replicas(self) -> int:
        """Groups that each hold the whole model."""
        return self.world_size // self.shard_size

    @property
    def shard(self) -> int:
        """This process's place in its group."""
        return self.rank % self.shard_size

    @property
    def replica(self) -> int:
        """The number of this process's group."""
        return self.rank // self.shard_size

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """For `fully_shard`. Collective."""
        if self.replicas == 1:
            return init_device_mesh(device_type, (self.world_size,))
        names = ("replicate", "shard")
        shape = (self.replicas, self.shard_size)
        return init_device_mesh(device_type, shape, mesh_dim_names=names)


def shard_mesh(rank: int, world_size: int, shard_size: int | None) -> ShardMesh:
    """The mesh of groups of `shard_size` processes; None is one group.

    Raises:
        ConfigError: the groups would not be equal, or of one process.
    """
    size = world_size if shard_size is None else shard_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or world_size % size:
        raise ConfigError(
            f"shard_size={size!r} does not divide the {world_size} processes into equal groups; "
            "give the number of GPUs of a machine, or leave it out to shard over all"
        )
    if size == 1 < world_size:
        raise ConfigError(
            "shard_size=1 gives every process the whole model; use engine=ddp for that, or shard "
            "over more processes"
        )
    return ShardMesh(rank, world_size, size)


def parallelism_of(request: Request) -> Mapping[str, int]:
    """Sizes of accelerate's `ParallelismConfig`, among the arguments or as its launcher set them;
    empty if there is none."""
    given: Any = request.accelerator_kwargs.get("parallelism_config")
    if given is not None:
        return sizes_of(given)
    if not is_true(request.launcher.get(PARALLELISM_VARIABLE)):
        return {}
    prefix = "PARALLELISM_CONFIG_"
    return {name: int(os.environ.get(prefix + name.upper(), "1")) for name in _SIZES}


def sizes_of(config: Any) -> Mapping[str, int]:
    """Of a `ParallelismConfig`, which has none of a kind in older versions."""
    return {name: getattr(config, name, None) or 1 for name in _SIZES}


def shard_size_of(request: Request) -> int | None:
    """The size of a group that is asked for, as `shard_size` or by a `ParallelismConfig`.

    Raises:
        ConfigError: both are, and differ.
    """
    sizes, asked = parallelism_of(request), request.options.get("shard_size")
    if sizes.get(_REPLICATE, 1) == 1 or sizes[_SHARD] == 1:
        return asked
    if asked not in (None, sizes[_SHARD]):
        raise ConfigError(
            f"shard_size={asked}, but accelerate's parallelism config says "
            f"dp_shard_size={sizes[_SHARD]}; make them agree, or leave one out"
        )
    return sizes[_SHARD]


def refuse_shared_samples(sizes: Mapping[str, int]) -> None:
    """Raise an EngineError if processes are to share a sample: here each has its own."""
    shared = {name: n for name, n in sizes.items() if n > 1 and name not in (_REPLICATE, _SHARD)}
    if shared:
        said = ", ".join(f"{name}={size}" for name, size in shared.items())
        raise EngineError(
            f"accelerate's parallelism config asks for {said}: processes that share a sample "
            "(tensor, context or sequence parallelism) are not available here, where each has its "
            "own; leave it out, and shard with FSDP2 (shard_size= for groups of processes) or ZeRO"
        )
