"""One process, and what every engine with a torch optimizer shares.

`TorchEngine` implements the contract for gradients that lie in the parameters and are stepped by
the user's optimizer. `SingleEngine` is that alone: nothing is exchanged, nothing is averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from accum_trainer.engine.base import Engine
from accum_trainer.engine.request import Request
from accum_trainer.engine.step import (
    gradients_in_weights_dtype,
    norm_of_replicas,
    parameters_of,
    refuse_data_parallel,
    set_gradient_dtype,
    square_sums,
    step_or_skip,
)
from accum_trainer.engine.sync import EVERY


class TorchEngine(Engine):
    """Gradients in `parameter.grad`, stepped by the user's optimizer; right for one process."""

    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        refuse_data_parallel(models)
        prepared = [self.accelerator.prepare_model(model) for model in models]
        # Also of frozen parameters, which may be unfrozen later.
        parameters = [p for model in prepared for p in model.parameters()]
        set_gradient_dtype(parameters, self.settings.gradient_dtype)
        return prepared, [self.accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]

    @contextlib.contextmanager
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> Iterator[None]:
        # accelerate's own optimizer and scheduler wrappers act on this flag.
        self.accelerator.sync_gradients = is_last
        with self._sync(models, is_last or self.grad_sync == EVERY):
            yield

    @contextlib.contextmanager
    def _sync(self, models: Sequence[torch.nn.Module], exchange: bool) -> Iterator[None]:
        """Let the backward inside exchange gradients, or keep it local."""
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def local_gradients(self, models: Sequence[torch.nn.Module]) -> dict[Any, torch.Tensor]:
        if self.accelerator.scaler is not None or (self.world_size > 1 and self.grad_sync == EVERY):
            return {}
        found = self._gradients_of(models)
        # Others are no part of the update, nor of its norm.
        owned = [{id(p) for p in parameters_of(o)} for o in self.prepared_optimizers()]
        stepping = [own for own in owned if any(id(p) in own for p in found)]
        if len(stepping) > 1:
            return {}
        return {p: gradient for p, gradient in found.items() if any(id(p) in o for o in stepping)}

    def _gradients_of(self, models: Sequence[torch.nn.Module]) -> dict[Any, torch.Tensor]:
        parameters = [p for model in models for p in model.parameters()]
        return {p: p.grad for p in parameters if p.grad is not None}

    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float | torch.Tensor]
    ) -> tuple[float, bool, np.ndarray]:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
        table = self.end_window([self.square_sum(parameters), *numbers])
        norm = self._norm(table[:, 0])
        is_finite = bool(np.isfinite(table[:, 0]).all())
        if not is_finite:
            self.note_nonfinite(parameters_of(optimizer))
        if is_finite and self.settings.max_grad_norm is not None:
            # torch's convention, a hair below the limit: max / (norm + 1e-6).
            total = torch.tensor(norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, total)
        self.accelerator.sync_gradients = True
        with gradients_in_weights_dtype(optimizer):
            stepped = step_or_skip(optimizer, scaler, is_finite)
        self.discard_window_grads(optimizer)
        return norm, stepped, table[:, 1:]

    def square_sum(self, parameters: list[torch.nn.Parameter]) -> float:
        """Sum of squares of the gradient that this rank holds."""
        return sum(square_sums([p.grad for p in parameters if p.grad is not None]))

    def _norm(self, squares: np.ndarray) -> float:
        """2-norm of the whole gradient, from every rank's `square_sum`."""
        return norm_of_replicas(squares)

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        self.accelerator.sync_gradients = True
        optimizer.zero_grad()

    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        for model in models:
            for parameter in model.parameters():
                parameter.grad = None


class SingleEngine(TorchEngine):
    """Both `grad_sync` policies are the same here."""

    name = "single"
    asked_for_as: ClassVar[Mapping[str, Mapping[str, Any]]] = {"single": {}}
    runs_plain_loops = True

    @classmethod
    def refusal(cls, processes: int) -> str:
        return "" if processes == 1 else "it is one process; start one, or use ddp"

    @classmethod
    def drives(cls, accelerator: Accelerator, request: Request) -> bool:
        # accelerate calls one process that torchrun started on a GPU MULTI_GPU, and wraps nothing.
        alone = accelerator.num_processes == 1
        kinds = (DistributedType.NO, *([DistributedType.MULTI_GPU] if alone else []))
        return accelerator.distributed_type in kinds
