"""DeepSpeed ZeRO: optimizer state, gradients and weights sharded over ranks, by stage.

DeepSpeed wants to own the loop: it divides by its own K, steps inside accelerate's backward, clips
and skips by its configuration. Here each backward is asked not to divide, the boundary of a window
is set by hand, and clipping is our `max_grad_norm` in its configuration (`zero_config`). Its
overflow check, a decision of all ranks, is read and not repeated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.base import Engine
from accum_trainer.engine.request import Request
from accum_trainer.engine.retry import LOWER
from accum_trainer.engine.settings import Settings
from accum_trainer.engine.step import refuse_data_parallel, set_gradient_dtype, square_sums
from accum_trainer.engine.sync import (
    AUTO,
    EVERY,
    ONCE,
    Syncs,
    choose_grad_sync,
    choose_weight_sync,
    gradient_bytes,
    numbers_of,
)
from accum_trainer.engine.usage import Agreement, Usage
from accum_trainer.engine.zero_build import (
    await_extension,
    prepared_by_deepspeed,
    stand_in_for_launcher,
)
from accum_trainer.engine.zero_config import (
    complete,
    keep_weights,
    make_plugin,
    offloaded,
    weights_are_set,
)
from accum_trainer.engine.zero_internals import (
    before_overflow_is_dropped,
    check_internals,
    forget_forwards_alone,
    hold_back_reductions,
)
from accum_trainer.engine.zero_state import FlatState, PartitionedState
from accum_trainer.errors import ConfigError, EngineError


class ZeroEngine(Engine):
    """All stages. Every window ends in `engine.step()`, which clips, checks and steps.

    Attributes:
        stage: 0 to 3.
        internals: names of DeepSpeed's sharding optimizer that this class reads or writes.
        shards_gradients: each backward may reduce its gradients into shards. Under
            once-per-window they stay local through the window (`coalesce_grad_reduction`), which
            takes a full local gradient in memory.
    """

    name = "DeepSpeed ZeRO"
    options = ("zero_stage", "cpu_offload")
    asked_for_as: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"zero{stage}": {"zero_stage": stage} for stage in range(4)
    }
    library = "deepspeed"
    can_change_trained = False
    autocasts = False
    rounds_reduced_gradients = True

    stage: ClassVar[int]
    internals: ClassVar[tuple[str, ...]] = ()
    shards_gradients: ClassVar[bool] = False

    @classmethod
    def is_asked_for(cls, request: Request) -> bool:
        return "zero_stage" in request.options or request.names(cls.library)

    @classmethod
    def accelerator_kwargs(cls, request: Request) -> dict[str, Any]:
        kwargs = dict(request.accelerator_kwargs)
        # With cpu=True accelerate silently runs DDP.
        if kwargs.pop("cpu", None) and torch.cuda.is_available():
            raise EngineError(
                "DeepSpeed cannot be kept on the CPU of a machine with a GPU; hide the GPU with "
                "CUDA_VISIBLE_DEVICES="
            )
        stand_in_for_launcher()
        kwargs["deepspeed_plugin"] = make_plugin(
            request.options.get("zero_stage"),
            bool(request.options.get("cpu_offload")),
            kwargs.get("mixed_precision"),
            kwargs.get("deepspeed_plugin"),
        )
        await_extension()
        if not torch.cuda.is_available():
            # DeepSpeed's processes find each other over gloo only if accelerate asks for it.
            gloo = InitProcessGroupKwargs(backend="gloo")
            kwargs["kwargs_handlers"] = [gloo, *kwargs.get("kwargs_handlers", [])]
        return kwargs

    @classmethod
    def drives(cls, accelerator: Accelerator, request: Request) -> bool:
        return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)

    @classmethod
    def on(cls, accelerator: Accelerator, asked: Syncs, request: Request) -> Engine:
        return STAGES[int(accelerator.state.deepspeed_plugin.zero_stage)](accelerator, asked)

    def __init__(self, accelerator: Accelerator, asked: Syncs) -> None:
        super().__init__(accelerator, asked)
        self._window = contextlib.ExitStack()
        self._is_leaving = False
        self._reduces = False  # the micro-batch in hand, in its backward or right after it
        self._agreement = Agreement(self, self.name)

    @property
    def gradient_divisor(self) -> float:
        # The mean over ranks; `backward(scale_wrt_gas=False)` leaves DeepSpeed's own K out.
        return self.world_size

    @property
    def reduces_in_last_backward(self) -> bool:
        return not self._defers_reduction

    @property
    def _defers_reduction(self) -> bool:
        """Whether gradients are reduced after a window's last backward, not during it."""
        if self.shards_gradients:
            return self.grad_sync == ONCE
        return self.defer_grad_reduction and self._can_coalesce

    @property
    def _can_coalesce(self) -> bool:
        return hasattr(self._deepspeed, "coalesce_grad_reduction")  # deepspeed 0.19

    # --- set-up ---

    def configure(self, plan: BatchPlan, settings: Settings) -> None:
        super().configure(plan, settings)
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        complete(config, plan, settings, self.mixed_precision)
        self.offloaded = offloaded(config)
        self.accelerator.gradient_accumulation_steps = plan.gradient_accumulation_steps

    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        refuse_data_parallel(models)
        if not models and not optimizers:
            return [], []
        if len(models) != 1 or len(optimizers) != 1:
            raise EngineError(
                f"DeepSpeed prepares one model and its optimizer together, not {len(models)} and "
                f"{len(optimizers)}; call acc.prepare(model, optimizer)"
            )
        self._choose_weight_sync(models[0])
        model, optimizer = prepared_by_deepspeed(self.accelerator, models[0], optimizers[0])
        self._deepspeed = model
        hold_back_reductions(model, unless=lambda: self._is_leaving)
        if model.zero_optimization_stage() != self.stage:
            raise EngineError(
                f"ZeRO stage {self.stage} was asked for, stage {model.zero_optimization_stage()} "
                "is in force"
            )
        check_internals(model.optimizer, self.stage, self.internals)
        if isinstance(self, FlatState):
            self.check_own_parts(model)
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self._usage = Usage(trained, are_whole=self.runs_alone)
        self._choose_grad_sync()
        # Gathering weights, and reducing each micro-batch, takes all ranks.
        self.equal_micro_batches = not self.runs_alone or self.grad_sync == EVERY
        if self.shards_gradients and self.grad_sync == ONCE:
            # Kept in the parameters through the window; shards follow `grad_accum_dtype`.
            set_gradient_dtype(list(trained.values()), self.settings.gradient_dtype)
        return [model], [optimizer]

    def _choose_weight_sync(self, model: torch.nn.Module) -> None:
        """For an engine that shards weights, before DeepSpeed takes them."""

    def _choose_grad_sync(self) -> None:
        if not self.shards_gradients:
            self.grad_sync = ONCE
            self.grad_sync_reason = f"stage {self.stage} reduces at a window's end only"
            return
        if self._asked.grad_sync == AUTO:
            gradient = gradient_bytes(self._deepspeed.parameters(), self.settings.gradient_dtype)
            self.grad_sync, self.grad_sync_reason = choose_grad_sync(self, gradient)
        if self.grad_sync == ONCE and not self._can_coalesce:
            if self._asked.grad_sync == ONCE:
                raise EngineError(
                    "grad_sync=once-per-window needs deepspeed 0.19 or newer at stages 2 and 3; "
                    "upgrade, or use auto"
                )
            self.grad_sync = EVERY
            self.grad_sync_reason = "deepspeed before 0.19 cannot hold reductions back"

    def unwrap(self, model: torch.nn.Module) -> Any:
        return self.accelerator.unwrap_model(model)

    # --- one window ---

    def begin_window(self, models: Iterable[torch.nn.Module]) -> None:
        self._usage.used.clear()
        self._deepspeed.optimizer.zero_grad(set_to_none=True)
        self._forget_reduced(self._deepspeed.optimizer)

    @contextlib.contextmanager
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> Iterator[None]:
        if list(models) != [self._deepspeed]:
            raise EngineError(
                "accumulate() got a model that is not the one prepare() returned; DeepSpeed would "
                "not see its gradients"
            )
        self.accelerator.sync_gradients = is_last
        self._reduces = is_last or self.grad_sync == EVERY
        coalesce = self._defers_reduction
        if is_first:
            self._leave_window()
            if coalesce:
                self._window.enter_context(self._deepspeed.coalesce_grad_reduction())
        # While coalescing, leaving the window is the boundary.
        self._deepspeed.set_gradient_accumulation_boundary(is_last and not coalesce)
        yield
        if is_last:
            if coalesce:
                self._compare_usage()
            self._leave_window()

    def backward(self, loss: torch.Tensor) -> None:
        reduces_now = self._reduces and not self._defers_reduction
        self._usage.watch(loss, self._compare_usage if reduces_now else None)
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def local_gradients(self, models: Sequence[torch.nn.Module]) -> dict[Any, torch.Tensor]:
        if self.mixed_precision != "no" or (self.shards_gradients and self.grad_sync == EVERY):
            return {}  # in buffers of DeepSpeed's own, by stage and precision
        parameters = self._deepspeed.module.parameters()
        return {p: p.grad for p in parameters if p.grad is not None}

    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float | torch.Tensor]
    ) -> tuple[float, bool, np.ndarray]:
        table = self.end_window(numbers)
        skipped = self._deepspeed.skipped_steps
        self._step()
        norm = self._deepspeed.get_global_grad_norm()
        return float(norm), self._deepspeed.skipped_steps == skipped, table

    def _step(self) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(True)
        with before_overflow_is_dropped(self._deepspeed.optimizer, self.note_nonfinite):
            self._deepspeed.step()

    def end_window(self, numbers: Sequence[float | torch.Tensor]) -> np.ndarray:
        table = self.all_gather_floats([float(self._agreement.left_some_out), *numbers])
        self._agreement.hear(bool(table[:, 0].any()))
        self._usage.used.clear()
        return table[:, 1:]

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        self._leave_window()
        self._usage.used.clear()
        self._deepspeed.optimizer.zero_grad(set_to_none=True)
        self._forget_reduced(self._deepspeed.optimizer)

    def _forget_reduced(self, sharded: Any) -> None:
        """Drop reduced shards and count micro-steps anew, as DeepSpeed does when it skips a
        step."""

    def _leave_window(self) -> None:
        self._is_leaving = True
        try:
            self._window.close()
        finally:
            self._is_leaving = False

    def _compare_usage(self) -> None:
        used = self._usage.used if self._defers_reduction else self._usage.used_now
        self._agreement.check(self._usage.left_out(used))

    # --- a micro-batch that ran out of memory ---

    def retry_blocker(self, is_last: bool) -> str:
        blocker = super().retry_blocker(is_last)
        if blocker and self.runs_alone and not self._can_coalesce:
            blocker += "; that needs deepspeed 0.19 or newer"
        return blocker

    def abort_micro_batch(self, error: Exception) -> None:
        super().abort_micro_batch(error)
        if hasattr(self._deepspeed.optimizer, "exit_backward"):
            # An interrupted backward did not exit, and the next would count as nested in it.
            self._deepspeed.optimizer.exit_backward()

    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        self._deepspeed.optimizer.zero_grad(set_to_none=True)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)
        if self.mixed_precision != "fp16" or scaler is None:
            return {}
        return {"loss_scale": float(scaler.cur_scale)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "loss_scale" in state:
            self._deepspeed.optimizer.loss_scaler.cur_scale = state["loss_scale"]


class ZeroStage0(ZeroEngine):
    """Nothing is sharded: DeepSpeed's own data parallelism. It steps on any gradient, so the norm
    is taken and the decision made before."""

    name, stage = "zero0", 0

    @property
    def _defers_reduction(self) -> bool:
        return False

    def configure(self, plan: BatchPlan, settings: Settings) -> None:
        if self.mixed_precision == "bf16" and settings.gradient_dtype == torch.float32:
            raise EngineError(
                "ZeRO stage 0 keeps gradients of bf16 weights in bf16, and "
                "accumulation_dtype=float32 is asked for; use zero_stage=1, plain DDP (which "
                "trains float32 weights under autocast), or accumulation_dtype=bfloat16"
            )
        super().configure(plan, settings)

    def retry_blocker(self, is_last: bool) -> str:
        return f"ZeRO stage 0 does not support it; {LOWER}, or use plain DDP"

    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float | torch.Tensor]
    ) -> tuple[float, bool, np.ndarray]:
        parameters = self._deepspeed.module.parameters()
        norm = math.sqrt(sum(square_sums([p.grad for p in parameters if p.grad is not None])))
        table = self.end_window([float(not math.isfinite(norm)), *numbers])
        stepped = not table[:, 0].any()
        if stepped:
            self._step()
        else:
            self.note_nonfinite()
            self.discard_window_grads(optimizer)
        return norm, stepped, table[:, 1:]

    def full_gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        named = self.unwrap(model).named_parameters()
        return {
            name: p.grad.detach() for name, p in named if p.requires_grad and p.grad is not None
        }


class ZeroStage1(FlatState, ZeroEngine):
    """Optimizer state is sharded. Gradients are reduced at a window's end, in its last backward or,
    under `defer_grad_reduction`, after it."""

    name, stage = "zero1", 1
    internals = (
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "single_partition_of_fp32_groups",
    )
    shards_optimizer = True

    def _forget_reduced(self, sharded: Any) -> None:
        if hasattr(sharded, "averaged_gradients"):  # not with bf16 at stage 1
            # Before a first step one of them may lack a group that the other has.
            for group in {*sharded.averaged_gradients, *sharded.all_grad_tensors}:
                sharded.averaged_gradients[group] = sharded.all_grad_tensors[group] = None
            sharded.micro_step_id = -1


class ZeroStage2(ZeroStage1):
    """Gradients are sharded too."""

    name, stage = "zero2", 2
    shards_gradients = True


class ZeroStage3(PartitionedState, ZeroEngine):
    """Weights are sharded too, and gathered in each forward.

    weight_sync=once-per-window: all weights are what DeepSpeed calls persistent. A step shards them
    and gathers the new ones; between steps no forward or backward has to.
    """

    name, stage = "zero3", 3
    internals = ("averaged_gradients", "micro_step_id", "fp32_partitioned_groups_flat")
    runs_alone = False
    can_compile = False  # each weight is fetched when it is used
    shards_optimizer = True
    shards_gradients = True

    _has_gone_back = False

    def _choose_weight_sync(self, model: torch.nn.Module) -> None:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        obstacle = weights_are_set(config)
        numbers = sum(numbers_of(p) for p in model.parameters())
        self.weight_sync, self.weight_sync_reason = self._asked.weight_sync, "asked for"
        if obstacle and self._asked.weight_sync == ONCE:
            raise ConfigError(
                f"weight_sync={ONCE} keeps all weights on the device through a window, but "
                f"{obstacle}; leave one of the two out"
            )
        if obstacle:
            self.weight_sync, self.weight_sync_reason = EVERY, obstacle
        elif self._asked.weight_sync == AUTO:
            gradient = 0
            if self._asked.grad_sync != EVERY:
                gradient = gradient_bytes(model.parameters(), self.settings.gradient_dtype)
            compute = 4 if self.mixed_precision == "no" else 2
            self.weight_sync, self.weight_sync_reason = choose_weight_sync(
                self, compute * numbers, gradient, self.plan.gradient_accumulation_steps
            )
        if self.weight_sync == ONCE:
            keep_weights(config, numbers)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if not self._has_gone_back:
            self._has_gone_back = True
            forget_forwards_alone()

    def _forget_reduced(self, sharded: Any) -> None:
        sharded.averaged_gradients = {}
        sharded.micro_step_id = 0


STAGES = {kind.stage: kind for kind in (ZeroStage0, ZeroStage1, ZeroStage2, ZeroStage3)}
