"""What FSDP2 keeps of a sharded model, for which torch has no public names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

_IN_FORWARD, _IDLE = TrainingState.FORWARD, TrainingState.IDLE


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_mesh(tensor: DTensor) -> DTensor:
    """A sharded tensor whose shard lies where the mesh's collectives run: NCCL has none for shards
    in host memory."""
    return DTensor.from_local(  # which moves it
        tensor.to_local(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def unsharded(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The whole parameters, which autograd sees. FSDP2 makes them once and later only gives them
    memory."""
    found: dict[str, torch.nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            found |= {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor)}
            module.reshard()
    return found


def reshard(model: torch.nn.Module) -> None:
    """Put every parameter back into its shard; not inside a forward."""
    for group in groups_of(model):
        # After a forward that raised, torch before 2.13 takes itself to be in it still, where
        # the outermost weights stay gathered.
        if group._training_state is _IN_FORWARD:  # noqa: SLF001
            group._training_state = _IDLE  # noqa: SLF001
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def groups_of(model: torch.nn.Module) -> Iterator[Any]:
    """FSDP2's own record of the parameters that it gathers and reduces together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()  # noqa: SLF001
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
            yield from (group for group in groups if group is not None)


def parameters_in(model: torch.nn.Module) -> Iterator[Any]:
    """FSDP2's own record of each parameter."""
    for group in groups_of(model):
        yield from group.fsdp_params


def unreduced(parameter: Any) -> torch.Tensor | None:
    """The gradient of a whole parameter that has not been reduced; None if there is none."""
    gradient: torch.Tensor | None = parameter.unsharded_accumulated_grad
    if gradient is None and hasattr(parameter, "_unsharded_param"):
        gradient = parameter.unsharded_param.grad
    return gradient


def is_half_reduced(model: torch.nn.Module) -> bool:
    """Whether gradients are reduced inside a group of processes and not yet between groups."""
    return any(group._partial_reduce_output is not None for group in groups_of(model))  # noqa: SLF001


def forget_unreduced(model: torch.nn.Module) -> None:
    """Drop gradients that no parameter of the model shows."""
    for group in groups_of(model):
        group._partial_reduce_output = None  # noqa: SLF001
    for parameter in parameters_in(model):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter.unsharded_param.grad = None
