"""Run a model before training and leave no trace: modes, random state, buffers and gradients stay.

The proofs of this folder run the user's model a few times. This module knows how engines and
torch.compile wrap a model. It knows no batch and no loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Modules whose classes run the model in their `module` and return its output. A dry run may call
# the model inside them directly.
_WRAPPERS = ("torch.nn.parallel.distributed", "deepspeed.runtime.engine")

# A module and whether it is in training mode.
Modes = Sequence[tuple[torch.nn.Module, bool]]


def inside_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside the engine's wrapper; a compiled model is returned as it is."""
    inner = model
    while not is_compiled(inner) and type(inner).__module__.startswith(_WRAPPERS):
        inner = inner.module  # type: ignore[assignment]
    return inner


def is_compiled(module: Any) -> bool:
    """Whether torch compiled this module or its call; hooks registered later may then not run."""
    return (
        "_orig_mod" in getattr(module, "_modules", ())
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def modes_of(model: torch.nn.Module) -> Modes:
    """The mode of every module."""
    return [(module, module.training) for module in model.modules()]


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and no gradient inside; afterwards every mode and the random state are restored.

    Args:
        device: of the model; its generator is saved as well as the CPU's.
    """
    modes = modes_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
        model.eval()
        try:
            yield
        except Exception:
            # FSDP2: an unfinished forward leaves weights gathered, and their next use crashes.
            reset = getattr(model, "reset_iter_state", None)
            if callable(reset):
                reset()
            raise
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Each module in the given mode inside, in eval mode afterwards."""
    for module, training in modes:
        module.training = training
    try:
        yield
    finally:
        for module, _ in modes:
            module.training = False


@contextlib.contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore every buffer afterwards, including those that a forward in training mode updates."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):  # an expanded view accepts no copy
                    buffer.copy_(value)


@contextlib.contextmanager
def without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Keep activations inside.

    Reentrant checkpointing does not support `autograd.grad`, and warns when nothing needs a
    gradient.
    """
    checkpointed = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
