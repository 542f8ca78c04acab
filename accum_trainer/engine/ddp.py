"""DistributedDataParallel: gradients are averaged over ranks, once per window by default.

DDP exchanges while the backward runs, in buckets of the weights' dtype, and waits until each
parameter has had a gradient. A parameter that this rank's micro-batch left unused gets a gradient
of zero after the backward: other ranks may have used it, and would wait. If DDP's exchange is not
enough (bf16 weights whose gradients accumulate in float32; a device that runs out of memory), every
backward stays local and the exchange is made here, after it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from accum_trainer.batch import version_of
from accum_trainer.engine.request import Request
from accum_trainer.engine.single import TorchEngine
from accum_trainer.engine.sync import EVERY, Syncs
from accum_trainer.errors import EngineError

# Numbers exchanged at a time: DDP's default bucket of 25 MiB, in float32.
_BUCKET = 25 * 2**20 // 4


class DDPEngine(TorchEngine):
    """Under `once-per-window` ranks may hold different numbers of micro-batches: only the last of
    each is exchanged."""

    name = "ddp"
    asked_for_as: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ddp": {}}
    can_change_trained = False
    runs_plain_loops = True

    def __init__(self, accelerator: Accelerator, asked: Syncs) -> None:
        super().__init__(accelerator, asked)
        self.equal_micro_batches = self.grad_sync == EVERY
        self._backward_exchanges = False
        self._trained: list[torch.nn.Parameter] = []
        self._models: list[DistributedDataParallel] = []
        # Parameters that this rank has not used in the window in hand.
        self._only_zeros: set[torch.nn.Parameter] = set()

    @classmethod
    def refusal(cls, processes: int) -> str:
        # Also for one that a launcher started: on a GPU accelerate then wraps nothing.
        if processes > 1:
            return ""
        return (
            "it averages gradients over two or more; start them with `accelerate launch "
            "--multi_gpu --num_processes N` or `torchrun --nproc_per_node N`, or use single"
        )

    @classmethod
    def drives(cls, accelerator: Accelerator, request: Request) -> bool:
        # accelerate wraps the model of one process that torchrun started on a CPU, not on a GPU.
        several = accelerator.num_processes > 1
        kinds = (DistributedType.MULTI_CPU, *([DistributedType.MULTI_GPU] if several else []))
        return accelerator.distributed_type in kinds

    @property
    def reduces_in_last_backward(self) -> bool:
        """True if the micro-batch in hand is the last and DDP itself exchanges its gradients."""
        return self._backward_exchanges

    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        if any(isinstance(model, DistributedDataParallel) for model in models):
            raise EngineError(
                "the model is wrapped in DistributedDataParallel already; pass the plain model"
            )
        prepared = super().prepare(models, optimizers)
        self._trained += [p for model in models for p in model.parameters() if p.requires_grad]
        self._models += [m for m in prepared if isinstance(m, DistributedDataParallel)]
        return prepared

    def unwrap(self, model: torch.nn.Module) -> Any:
        # accelerate's unwrap_model imports DeepSpeed to compare types; not for the common case.
        is_wrapped = isinstance(model, DistributedDataParallel)
        return model.module if is_wrapped else self.accelerator.unwrap_model(model)

    @contextlib.contextmanager
    def _sync(self, models: Sequence[torch.nn.Module], exchange: bool) -> Iterator[None]:
        here = []  # models whose gradients are exchanged after the backward, not by DDP
        with contextlib.ExitStack() as stack:
            # A loss may go through a model that this window does not train, as a generator's goes
            # through the discriminator; DDP would wait for its gradients.
            for other in self._models:
                if other not in models:
                    stack.enter_context(other.no_sync())
            for model in models:
                if not isinstance(model, DistributedDataParallel):
                    raise EngineError(
                        f"accumulate() got a {type(model).__name__} that is not distributed, so "
                        f"its gradients would never be averaged over the {self.world_size} "
                        "processes; pass the model that prepare() returned"
                    )
                if exchange and self._exchanged_here(model):
                    here.append(model)
                if not exchange or model in here:
                    stack.enter_context(model.no_sync())
            self._backward_exchanges = exchange and len(here) < len(models)
            there = [
                p for model in models if exchange and model not in here for p in model.parameters()
            ]
            before = [(p, p.grad, _grad_version(p)) for p in there if p.requires_grad]
            yield
        for model in here:
            self._exchange([p for p in model.parameters() if p.requires_grad])
        self._complete(before)

    def _exchanged_here(self, model: DistributedDataParallel) -> bool:
        """Whether gradients are exchanged after the last backward, because DDP cannot do it."""
        if (
            model.find_unused_parameters
            or model.static_graph
            or (self.defer_grad_reduction and not self.equal_micro_batches)
        ):
            return True
        dtype = self.settings.gradient_dtype
        return any(p.dtype != dtype for p in model.parameters() if p.requires_grad)

    def abort_micro_batch(self, error: Exception) -> None:
        super().abort_micro_batch(error)
        # DDP broadcasts rank 0's buffers before the first forward after an exchange. If that
        # forward failed, its retry must not broadcast again: the other ranks are elsewhere.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            model = frame.f_locals.get("self")
            if (
                isinstance(model, DistributedDataParallel)
                and frame.f_code.co_name == "_run_ddp_forward"
            ):
                model.require_forward_param_sync = False

    def _complete(self, before: list[tuple[torch.nn.Parameter, torch.Tensor | None, int]]) -> None:
        """Give a gradient of zero to parameters that a backward left out, so that DDP's exchange
        ends, here and on ranks that used them. Gradients of earlier micro-batches are averaged.

        Args:
            before: parameters with their gradients and versions before the backward.
        """
        left_out = [
            p
            for p, gradient, version in before
            if p.grad is gradient and _grad_version(p) == version
        ]
        self._only_zeros -= {p for p, *_ in before} - set(left_out)
        if left_out:
            self._only_zeros |= {p for p in left_out if p.grad is None}
            apply: Any = _Zeros.apply
            apply(*left_out).backward()

    def end_window(self, numbers: Sequence[float | torch.Tensor]) -> np.ndarray:
        table = self.all_gather_floats([float(len(self._only_zeros)), *numbers])
        if table[:, 0].all():  # every rank left some out: which ones did all of them?
            used = torch.tensor(
                [p not in self._only_zeros for p in self._trained],
                dtype=torch.int32,
                device=self.device,
            )
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            for parameter, is_used in zip(self._trained, used.tolist(), strict=True):
                if not is_used:
                    # Used by no rank: the optimizer leaves it alone, as in one process.
                    parameter.grad = None
        return table[:, 1:]

    def begin_window(self, models: Iterable[torch.nn.Module]) -> None:
        super().begin_window(models)
        self._only_zeros.clear()

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        super().discard_window_grads(optimizer)
        self._only_zeros.clear()

    def _exchange(self, parameters: list[torch.nn.Parameter]) -> None:
        """Average gradients over ranks in place. A parameter that no rank used keeps none; on a
        rank that did not use one that others did, it counts as 0."""
        used = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.int32, device=self.device
        )
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        bucket: list[torch.nn.Parameter] = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if not is_used:
                continue
            if parameter.grad is None:
                dtype = self.settings.gradient_dtype
                parameter.grad = torch.zeros_like(parameter, dtype=dtype)
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= _BUCKET:
                self._average(bucket)
                bucket = []
        if bucket:
            self._average(bucket)

    def _average(self, bucket: list[torch.nn.Parameter]) -> None:
        gradients = [p.grad for p in bucket if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


class _Zeros(torch.autograd.Function):
    """A scalar of the parameters; its gradients are zero and take no memory."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return tuple(
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.like
        )


def _grad_version(parameter: torch.Tensor) -> int:
    return 0 if parameter.grad is None else version_of(parameter.grad)
