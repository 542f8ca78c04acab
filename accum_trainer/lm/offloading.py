"""Inputs of checkpointed blocks wait in host memory for their backward (`--activation-offload`).

Gradient checkpointing computes a block anew in its backward, from its input, which it keeps: on
long sequences these inputs are most of what a GPU holds. Here each leaves the device when its block
has run and comes back when its backward begins. Copies follow the device's own order, so the host
waits for none; they do not overlap with computation. Knows transformers' blocks; no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from accum_trainer.batch import version_of
from accum_trainer.errors import ConfigError

# What a checkpointing module of transformers calls to run its forward; there is no public name.
_CHECKPOINT = "_gradient_checkpointing_func"


def to_host(tensor: torch.Tensor) -> Any:
    """What is kept of a block's input: its device and a copy on the host."""
    if tensor.device.type != "cuda":
        return stay(tensor)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, copy.copy_(tensor, non_blocking=True)


def to_device(kept: Any) -> torch.Tensor:
    """The input again."""
    device, copy = kept
    if isinstance(device, torch.device):
        back: torch.Tensor = copy.to(device, non_blocking=True)
        return back
    return _stayed(kept)


def stay(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """What is kept of a tensor that is not moved. torch compares versions of what it saves itself,
    not of what a hook gives back."""
    return version_of(tensor), tensor


def _stayed(kept: tuple[int, torch.Tensor]) -> torch.Tensor:
    version, tensor = kept
    if version_of(tensor) != version:
        raise RuntimeError(
            "an input of a checkpointed block was modified by an inplace operation before its "
            "backward: its gradient cannot be computed"
        )
    return tensor


def offload_block_inputs(
    model: torch.nn.Module,
    away: Callable[[torch.Tensor], Any] = to_host,
    back: Callable[[Any], torch.Tensor] = to_device,
) -> None:
    """Have each checkpointed block of `model` keep its input as `away` returns it, until `back`
    makes it a tensor again.

    Raises:
        ConfigError: the model has no checkpointed block that transformers runs.
    """
    blocks = [module for module in model.modules() if _CHECKPOINT in vars(module)]
    if not blocks:
        raise ConfigError(
            "activation_offload moves the inputs of blocks that transformers checkpoints, and "
            f"{type(model).__name__} has none; leave it out"
        )
    for block in blocks:
        checkpoint = partial(_offloading, vars(block)[_CHECKPOINT], away, back)
        setattr(block, _CHECKPOINT, checkpoint)


def offloads_block_inputs(model: torch.nn.Module) -> bool:
    """Whether `offload_block_inputs` was called for the model."""
    checkpoints = (vars(module).get(_CHECKPOINT) for module in model.modules())
    return any(getattr(found, "func", None) is _offloading for found in checkpoints)


def _offloading(
    checkpoint: Callable[..., Any],
    away: Callable[[torch.Tensor], Any],
    back: Callable[[Any], torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One call of a block. Its first input moves, the hidden states; masks and the like are shared
    by all blocks and stay.

    What the block itself saves goes through the checkpoint's own hooks, not through these.
    """
    has_moved = False

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal has_moved
        if has_moved or not tensor.is_floating_point() or not tensor.numel():
            return False, stay(tensor)
        has_moved = True
        return True, away(tensor)

    def unpack(kept: tuple[bool, Any]) -> torch.Tensor:
        moved, packed = kept
        return back(packed) if moved else _stayed(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return checkpoint(*args, **kwargs)
