"""FSDP2: weights, gradients and optimizer state sharded over ranks by torch's `fully_shard`.

Applied here and not by accelerate, which knows no FSDP on the CPU and reduces gradients in the
parameters' dtype: each block and then the whole model is sharded, gradients are reduced in float32,
and the optimizer is pointed at the sharded parameters.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from accum_trainer.engine.fsdp_internals import (
    forget_unreduced,
    is_half_reduced,
    local,
    on_mesh,
    parameters_in,
    reshard,
    unreduced,
    unsharded,
)
from accum_trainer.engine.fsdp_settings import offloads, refuse_lost_settings
from accum_trainer.engine.mesh import (
    PARALLELISM_VARIABLE,
    parallelism_of,
    refuse_shared_samples,
    shard_mesh,
    shard_size_of,
)
from accum_trainer.engine.own_parts import Part, share_of
from accum_trainer.engine.request import Request
from accum_trainer.engine.scattering import Whole, is_on_meta
from accum_trainer.engine.single import TorchEngine
from accum_trainer.engine.step import refuse_data_parallel, square_sums
from accum_trainer.engine.sync import (
    AUTO,
    ONCE,
    Syncs,
    choose_grad_sync,
    choose_weight_sync,
    gradient_bytes,
)
from accum_trainer.engine.usage import Agreement, Usage
from accum_trainer.errors import EngineError


class FSDPEngine(TorchEngine):
    """grad_sync=once-per-window: gradients stay unsharded in memory until the last micro-batch;
    every-microbatch: reduced and sharded after each backward, the least memory.

    weight_sync=once-per-window: weights are gathered in a window's first forward and sharded again
    after its last backward; every-microbatch: each block is sharded after its forward and after its
    backward. A window always begins from the shards, whatever ran before it.

    Groups of processes (`mesh`) exchange gradients once per window, under either policy.

    cpu_offload: the shards of weights, gradients and optimizer state lie in host memory, where the
    optimizer steps. Collectives still run on the device.
    """

    name = "fsdp2"
    options = ("fsdp", "shard_size", "cpu_offload")
    asked_for_as: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fsdp2": {"fsdp": True}}
    library = "fsdp"
    runs_alone = False  # weights are gathered in every forward
    equal_micro_batches = True
    shards_optimizer = True
    autocasts = False
    deals_weights = True

    @classmethod
    def is_asked_for(cls, request: Request) -> bool:
        own = any(request.options.get(name) for name in ("fsdp", "shard_size"))
        return own or request.names(cls.library)

    @classmethod
    def accelerator_kwargs(cls, request: Request) -> dict[str, Any]:
        # accelerate must not shard as well, on the GPU either: this engine does.
        refuse_lost_settings(request.accelerator_kwargs.get("fsdp_plugin"))
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        refuse_shared_samples(parallelism_of(request))
        os.environ.pop(PARALLELISM_VARIABLE, None)
        kwargs = super().accelerator_kwargs(request)
        for name in ("fsdp_plugin", "parallelism_config"):
            kwargs.pop(name, None)
        return kwargs

    @classmethod
    def drives(cls, accelerator: Accelerator, request: Request) -> bool:
        return cls.is_asked_for(request)

    @classmethod
    def on(cls, accelerator: Accelerator, asked: Syncs, request: Request) -> FSDPEngine:
        return cls(accelerator, asked, shard_size_of(request), offloads(request))

    def __init__(
        self, accelerator: Accelerator, asked: Syncs, shard_size: int | None, cpu_offload: bool
    ) -> None:
        super().__init__(accelerator, asked)
        if cpu_offload:
            self.offloaded = "weights, gradients and optimizer state in host memory"
        # One that a launcher started is a mesh of one: a script for many GPUs, tried on one.
        if accelerator.num_processes == 1 and not torch.distributed.is_initialized():
            raise EngineError(
                "FSDP2 shards over processes, and there is one, which no launcher started; launch "
                "several, or one with torchrun --nproc_per_node=1, or leave FSDP out"
            )
        if accelerator.mixed_precision == "fp16":
            raise EngineError("mixed_precision=fp16 is not available with FSDP2 here; use bf16")
        self._mesh = shard_mesh(self.rank, self.world_size, shard_size)
        self.shard_size = self._mesh.shard_size if self._mesh.replicas > 1 else None
        if self.shard_size is not None and not self._reduces_unused:
            raise EngineError(
                f"shard_size={self.shard_size} needs torch 2.13 or newer, and this is "
                f"{torch.__version__}: an older one reduces only what a process has used, and "
                "groups would wait for each other without end; leave shard_size out"
            )
        # Of each model: what is gathered together, the model itself among them.
        self._units: dict[torch.nn.Module, list[Any]] = {}
        self._prepared: list[AcceleratedOptimizer] = []
        self._sharded: dict[str, torch.nn.Parameter] = {}
        self._usage = Usage({})
        self._agreement = Agreement(self, self.name)
        self._exchanges = False  # the micro-batch in hand

    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        refuse_data_parallel(models)
        self._choose_syncs([*self._units, *models])
        renamed: dict[int, torch.nn.Parameter] = {}
        whole_ones: dict[str, torch.Tensor] = {}
        for number, model in enumerate(models):
            before = dict(model.named_parameters())
            is_whole_on_one = any(self.gather_objects(is_on_meta(model)))
            whole = Whole(self, model) if is_whole_on_one else None
            self._shard(model)
            if whole is not None:
                whole.deal(model, self._mesh, self._home)
            self._units[model] = [m for m in model.modules() if isinstance(m, FSDPModule)]
            renamed |= {id(before[name]): p for name, p in model.named_parameters()}
            self._sharded |= {
                f"{number} {name}": p for name, p in model.named_parameters() if p.requires_grad
            }
            whole_ones |= {
                f"{number} {name}": p for name, p in unsharded(model).items() if p.requires_grad
            }
        self._usage = Usage(whole_ones)
        for optimizer in optimizers:
            if optimizer.state:
                raise EngineError(
                    "the optimizer has state already; FSDP2 shards its parameters, so prepare it "
                    "before the first step"
                )
            for group in optimizer.param_groups:
                missing = [p for p in group["params"] if id(p) not in renamed]
                if missing:
                    raise EngineError(
                        "the optimizer holds parameters of no model prepared with it; call "
                        "acc.prepare(model, optimizer)"
                    )
                group["params"] = [renamed[id(p)] for p in group["params"]]
        prepared = [AcceleratedOptimizer(one, device_placement=False) for one in optimizers]
        self._prepared += prepared
        return models, prepared

    def prepared_models(self) -> list[torch.nn.Module]:
        return list(self._units)

    def prepared_optimizers(self) -> list[AcceleratedOptimizer]:
        return self._prepared  # accelerate has not prepared them

    def _choose_syncs(self, models: Iterable[torch.nn.Module]) -> None:
        parameters = [p for model in models for p in model.parameters()]
        gradient = gradient_bytes(parameters, self.settings.gradient_dtype)
        if self._asked.grad_sync == AUTO:
            self.grad_sync, self.grad_sync_reason = choose_grad_sync(self, gradient)
        self.weight_sync, self.weight_sync_reason = self._asked.weight_sync, "asked for"
        if self._asked.weight_sync == AUTO:
            compute = self._compute_dtype
            weights = sum(p.numel() * (compute or p.dtype).itemsize for p in parameters)
            kept = gradient if self.grad_sync == ONCE else 0
            self.weight_sync, self.weight_sync_reason = choose_weight_sync(
                self, weights, kept, self.plan.gradient_accumulation_steps
            )

    @property
    def _home(self) -> torch.device:
        """Where shards lie."""
        return torch.device("cpu") if self.offloaded else self.device

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        """Of gathered weights; None for that of the shards."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else None

    def _shard(self, model: torch.nn.Module) -> None:
        mesh = self._mesh.device_mesh(self.device.type)
        # `reduce_dtype` is also the dtype of unreduced gradients. In bf16 a sum over ranks would
        # lose the small ones.
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=self._compute_dtype, reduce_dtype=self.settings.gradient_dtype
            ),
        }
        if self.offloaded:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        # Each call moves its own weights to the device and keeps a shard of them: no GPU has to
        # hold the whole model.
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, **options)
        sharded: FSDPModule = fully_shard(model, **options)
        if self._reduces_unused:
            # Otherwise each rank reduces the gradients that it has, and one parameter's may be
            # added to another's.
            sharded.set_reduce_scatter_unused_params(True)

    @property
    def _reduces_unused(self) -> bool:
        return hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # torch 2.13

    @contextlib.contextmanager
    def _sync(self, models: Sequence[torch.nn.Module], exchange: bool) -> Iterator[None]:
        self._exchanges = exchange
        for model in models:
            if not isinstance(model, FSDPModule):
                raise EngineError(
                    f"accumulate() got a {type(model).__name__} that is not sharded; pass the "
                    "model that prepare() returned"
                )
            model.set_requires_gradient_sync(exchange)
            if exchange and self._mesh.replicas > 1:
                # Reduced inside its group, a gradient waits for the window's end.
                model.set_requires_all_reduce(self.accelerator.sync_gradients)
        yield

    @contextlib.contextmanager
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> Iterator[None]:
        with super().microbatch(models, is_first, is_last):
            if self.weight_sync != ONCE:
                yield
                self._refuse_unreduced(models, is_last)
                return
            for model in models:
                for unit in self._units[model]:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.set_reshard_after_backward(is_last, recurse=False)
            try:
                yield
            finally:
                for model in models:
                    for unit in self._units[model]:  # as in an evaluation, or any other forward
                        unit.set_reshard_after_forward(unit is not model, recurse=False)
                        unit.set_reshard_after_backward(True, recurse=False)
            self._refuse_unreduced(models, is_last)
            if is_last:  # a model that the last micro-batch did not use is whole still
                self._reshard_all()

    def _refuse_unreduced(self, models: Sequence[torch.nn.Module], is_last: bool) -> None:
        """Raise an EngineError for a model whose gradient the last backward did not reach, and so
        did not reduce: the optimizer would not see it."""
        for model in models if is_last else ():
            name = type(model).__name__.removeprefix("FSDP")
            missed = (
                f"the window's last micro-batch does not use {name}, which earlier ones did, and "
                "FSDP2 exchanges gradients in the last backward: its update would miss them. Use "
                "each model in the last micro-batch, or prepare them as one module"
            )
            if is_half_reduced(model) or any(
                unreduced(p) is not None for p in parameters_in(model)
            ):
                # Groups wait for the last backward under either policy.
                waits = self._mesh.replicas > 1
                raise EngineError(missed + ("" if waits else ", or use grad_sync=every-microbatch"))

    def backward(self, loss: torch.Tensor) -> None:
        compares = self._exchanges and not self._reduces_unused
        self._usage.watch(loss, self._compare_usage if compares else None)
        super().backward(loss)

    def _compare_usage(self) -> None:
        """Before a reduction that takes only what a rank has used, of as many bytes on each."""
        used = self._usage.used if self.grad_sync == ONCE else self._usage.used_now
        unused = self._usage.left_out(used)
        # One that was frozen meanwhile is left out by all.
        self._agreement.check([name for name in unused if self._sharded[name].requires_grad])

    def end_window(self, numbers: Sequence[float | torch.Tensor]) -> np.ndarray:
        unused = self._usage.left_out(self._usage.used)
        left_some_out = float(self._agreement.left_some_out)
        table = self.all_gather_floats([float(len(unused)), left_some_out, *numbers])
        self._agreement.hear(bool(table[:, 1].any()))
        if table[:, 0].all():  # every rank left some out: which ones did all of them?
            for name in set.intersection(*map(set, self.gather_objects(unused))):
                # Used by no rank: the optimizer leaves it alone, as in one process.
                self._sharded[name].grad = None
        return table[:, 2:]

    def _gradients_of(self, models: Sequence[torch.nn.Module]) -> dict[Any, torch.Tensor]:
        found = {}
        for model in models:
            for p in parameters_in(model):
                gradient = unreduced(p)
                if gradient is not None:
                    found[p.sharded_param] = gradient
        return found

    def begin_window(self, models: Iterable[torch.nn.Module]) -> None:
        # Weights left whole, by an evaluation or a window that was broken off, may not be as their
        # shards are now, nor whole on every rank: then some would wait for the others' gather.
        self._reshard_all()
        super().begin_window(models)
        self._usage.used.clear()

    def _reshard_all(self) -> None:
        for model in self._units:
            reshard(model)

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        super().discard_window_grads(optimizer)
        self._usage.used.clear()

    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        for model in models:
            for parameter in parameters_in(model):
                parameter.sharded_param.grad = None
            forget_unreduced(model)

    def square_sum(self, parameters: list[torch.nn.Parameter]) -> float:
        return sum(square_sums([local(p.grad) for p in parameters if p.grad is not None]))

    def _norm(self, squares: np.ndarray) -> float:
        return math.sqrt(squares.sum() / self._mesh.replicas)

    # --- whole tensors; a forward without a backward leaves the outermost weights gathered, as
    # parameters of the model, so each method shards them again first ---

    def own_parts(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> list[Part]:
        reshard(model)
        return super().own_parts(model, optimizer)

    def each_full_weight(
        self, model: torch.nn.Module, trained_only: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        reshard(model)
        yield from super().each_full_weight(model, trained_only)

    def shapes_of_weights(self, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        reshard(model)
        return super().shapes_of_weights(model)

    def load_full_weights(
        self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]
    ) -> None:
        reshard(model)
        super().load_full_weights(model, weights)

    def each_parameter_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        reshard(model)
        yield from super().each_parameter_state(model, optimizer)

    def load_full_optimizer_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer, saved: dict[str, Any]
    ) -> None:
        reshard(model)
        super().load_full_optimizer_state(model, optimizer, saved)

    def _without_state(self, optimizer: AcceleratedOptimizer) -> list[torch.Tensor]:
        return [local(p) for p in super()._without_state(optimizer)]

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return on_mesh(tensor).full_tensor() if isinstance(tensor, DTensor) else tensor

    def _held_gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return None if parameter.grad is None else local(parameter.grad)

    def _set_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(self._sharded_like(parameter, value))

    def _set_parameter_state(
        self,
        optimizer: AcceleratedOptimizer,
        parameter: torch.Tensor,
        state: dict[str, torch.Tensor],
    ) -> None:
        optimizer.optimizer.state[parameter] = {
            key: value.clone() if value.ndim == 0 else self._sharded_like(parameter, value)
            for key, value in state.items()
        }

    def _own_weight(self, parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
        return self._own(parameter)

    def _own_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, tuple[tuple[int, ...], int, torch.Tensor]]:
        return {
            key: (tuple(value.shape), *self._own(value))
            for key, value in optimizer.optimizer.state.get(parameter, {}).items()
        }

    def _own(self, tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
        if not isinstance(tensor, DTensor) or tensor.ndim == 0:
            return share_of(local(tensor), self.rank, self.world_size)
        assert tensor.placements[-1] == Shard(0), tensor.placements
        mesh = self._mesh
        rows = -(-tensor.shape[0] // mesh.shard_size)  # of each rank but the last ones
        before = min(mesh.shard * rows, tensor.shape[0]) * math.prod(tensor.shape[1:])
        # Copies of a shard are written in parts, so that every rank writes as much.
        begin, values = share_of(tensor.to_local().reshape(-1), mesh.replica, mesh.replicas)
        return before + begin, values

    def _sharded_like(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert isinstance(parameter, DTensor)
        found = distribute_tensor(
            value.to(self.device), parameter.device_mesh, parameter.placements
        )
        if not self.offloaded:
            return found
        kept = torch.empty_like(parameter, dtype=found.dtype)  # where the parameter's shard lies
        local(kept).copy_(local(found))
        return kept
