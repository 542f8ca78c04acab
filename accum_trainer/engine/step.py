"""The arithmetic of one step of a torch optimizer: norm, cast, step or skip.

It knows parameters, an optimizer and a loss scaler; no engine, no ranks but for their numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer

from accum_trainer.errors import EngineError

# Numbers squared at a time: 32 MiB in float64.
_PIECE = 2**22


def parameters_of(optimizer: AcceleratedOptimizer) -> list[torch.nn.Parameter]:
    """The optimizer's parameters, over all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_data_parallel(models: Sequence[torch.nn.Module]) -> None:
    """Raise an EngineError for a model that splits each micro-batch over GPUs in one process."""
    if any(isinstance(model, torch.nn.DataParallel) for model in models):
        raise EngineError(
            "the model is wrapped in DataParallel, which averages per GPU inside one process, so "
            "the weights of a window cannot be right; pass the plain model and start one process "
            "per GPU with accelerate launch"
        )


def set_gradient_dtype(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Have autograd accumulate gradients in `dtype`, whatever the weights' dtype.

    In bf16, 256 + 1 - 256 is 0.
    """
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.grad_dtype = dtype


@contextlib.contextmanager
def gradients_in_weights_dtype(optimizer: AcceleratedOptimizer) -> Iterator[None]:
    """Cast gradients to their weights' dtype, the only one that optimizers take.

    Cast gradients are dropped afterwards; the next ones accumulate in the dtype of before.
    """
    cast = [
        (p, p.grad.dtype)
        for p in parameters_of(optimizer)
        if p.grad is not None and p.grad.dtype != p.dtype
    ]
    for p, _ in cast:
        assert p.grad is not None
        gradient, p.grad = p.grad.to(p.dtype), None
        p.grad_dtype = p.dtype
        p.grad = gradient
    yield
    for p, dtype in cast:
        p.grad = None
        p.grad_dtype = dtype


def step_or_skip(optimizer: AcceleratedOptimizer, scaler: Any, is_finite: bool) -> bool:
    """Step if the gradient is finite, update the loss scaler once; return whether it stepped."""
    if scaler is None:
        if is_finite:
            optimizer.step()
        return is_finite
    if not is_finite:
        # As scaler.update() does after an inf. Called on all ranks alike: this rank's own
        # gradient may be finite, and then scaler.update() would not lower the scale.
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 0})
        return False
    optimizer.step()
    return not optimizer.step_was_skipped


def norm_of_replicas(squares: np.ndarray) -> float:
    """2-norm of a gradient that every rank holds whole, from each rank's sum of squares.

    GPUs of different make may differ in the last bits. All ranks take rank 0's norm: if each
    clipped by its own, the replicas would drift apart.

    Raises:
        EngineError: the ranks hold different gradients.
    """
    norms = np.sqrt(squares)
    if np.isfinite(norms).all() and not np.allclose(norms, norms[0], rtol=1e-5, atol=0):
        raise EngineError(
            f"the processes hold different gradients (norms {', '.join(f'{n:.6g}' for n in norms)})"
            ", which an exchange should have made equal: does the loop change gradients, or call "
            "backward itself, on some processes only?"
        )
    return float(norms[0])


def square_sums(gradients: list[torch.Tensor]) -> list[float]:
    """Sum of squares of each gradient, in float64 if the device has it; one wait for the device.

    In float32 a million squares are already off by 1e-5, and every clipped update with them. The
    sum is made in pieces because torch copies a tensor that it sums in another dtype: in float64,
    twice the gradient's memory.
    """
    if not gradients:
        return [0.0]
    dtype = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    norms = [
        torch.linalg.vector_norm(piece, dtype=dtype) for g in gradients for piece in _pieces(g)
    ]
    squares = iter(norm**2 for norm in torch.stack(norms).tolist())
    return [sum(next(squares) for _ in _pieces(g)) for g in gradients]


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of at most `_PIECE` numbers, of whole rows if not contiguous; at least one view."""
    if tensor.numel() <= _PIECE:
        return [tensor]
    if tensor.is_contiguous():
        return torch.split(tensor.view(-1), _PIECE)
    return torch.split(tensor, max(1, _PIECE * tensor.shape[0] // tensor.numel()))
