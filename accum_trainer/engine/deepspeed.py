"""DeepSpeed ZeRO: optimizer state, gradients and weights sharded over ranks, one engine object that
does it all.

DeepSpeed wants to own the loop: it divides by its own K, steps inside accelerate's backward, clips
and skips by its configuration. Here it keeps what it does well and gives the rest back: each
backward is told not to divide, the boundary is set by hand, clipping comes from our `max_grad_norm`
written into its configuration, and its own overflow check (a decision of all ranks together) is
read, not repeated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedPlugin

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.base import Engine, Settings
from accum_trainer.engine.usage import Usage, refuse, refuse_difference
from accum_trainer.errors import ConfigError, EngineError

INSTALL = "pip install 'accum-trainer[deepspeed]'"
CONFIG_FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


class DeepSpeedEngine(Engine):
    """ZeRO stages 0 to 3.

    Stages 0 and 1 reduce at a window's end only, in its last backward or, where memory may run out
    there, after it. For 2 and 3, once-per-window keeps gradients local through the window
    (`coalesce_grad_reduction`) and reduces them in one pass, which takes a full local gradient in
    memory; every-microbatch reduces and shards them after each backward, the least memory.
    """

    can_change_trained = False

    def __init__(self, accelerator: Accelerator, grad_sync: str) -> None:
        super().__init__(accelerator, grad_sync)
        plugin = accelerator.state.deepspeed_plugin
        self.stage = int(plugin.zero_stage)
        self.name = f"zero{self.stage}"
        self.shards_weights = self.stage == 3
        self._window = contextlib.ExitStack()
        self._has_gone_back = self._is_leaving = False
        self._reduces = False  # the backward in hand, or what follows it at once
        self._asks_others, self._left_some_out = True, False

    @property
    def gradient_divisor(self) -> float:
        # DeepSpeed averages over ranks; `backward(scale_wrt_gas=False)` keeps it from dividing by
        # its K as well.
        return self.world_size

    def configure(self, plan: BatchPlan, settings: Settings) -> None:
        super().configure(plan, settings)
        if (
            self.stage == 0
            and self.mixed_precision == "bf16"
            and settings.accumulation_dtype == "float32"
        ):
            raise EngineError(
                "ZeRO stage 0 keeps gradients of bf16 weights in bf16, and "
                "accumulation_dtype=float32 is asked for; "
                "use zero_stage=1, plain DDP (which trains float32 weights under autocast), or "
                "accumulation_dtype=bfloat16"
            )
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        _complete(config, plan, settings, self.mixed_precision)
        self.accelerator.gradient_accumulation_steps = plan.gradient_accumulation_steps

    def _prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        if not models and not optimizers:
            return [], []
        if len(models) != 1 or len(optimizers) != 1:
            raise EngineError(
                f"DeepSpeed prepares one model and its optimizer together, not {len(models)} and "
                f"{len(optimizers)}; "
                "call acc.prepare(model, optimizer)"
            )
        model, optimizer = self.accelerator.prepare(models[0], optimizers[0])
        self._engine = model
        self._reduce_when_leaving_only()
        if model.zero_optimization_stage() != self.stage:
            raise EngineError(
                f"ZeRO stage {self.stage} was asked for, stage {model.zero_optimization_stage()} "
                "is in force"
            )
        check_names(model.optimizer, self.stage)
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self._usage = Usage(trained, are_whole=self.stage < 3)
        self._decide_grad_sync(model)
        # ZeRO-3 gathers weights in each forward; reducing each micro-batch needs all ranks at each.
        self.equal_micro_batches = self.stage == 3 or self.grad_sync == "every-microbatch"
        return [model], [optimizer]

    def _decide_grad_sync(self, model: torch.nn.Module) -> None:
        if self.stage < 2:
            self.grad_sync, self.grad_sync_reason = (
                "once-per-window",
                f"stage {self.stage} reduces at a window's end only",
            )
            return
        super()._decide_grad_sync(model)
        if self.grad_sync == "once-per-window" and not hasattr(
            self._engine, "coalesce_grad_reduction"
        ):
            if self._grad_sync_asked == "once-per-window":
                raise EngineError(
                    "grad_sync=once-per-window needs deepspeed 0.19 or newer at stages 2 and 3; "
                    "upgrade, or use auto"
                )
            self.grad_sync, self.grad_sync_reason = (
                "every-microbatch",
                "deepspeed before 0.19 cannot hold reductions back",
            )

    def _accumulate_in(self, parameters: list[torch.nn.Parameter]) -> None:
        """Reduced shards follow `grad_accum_dtype`; what is held back through a window lies in the
        parameters' gradients."""
        if self.stage in (2, 3) and self.grad_sync == "once-per-window":
            super()._accumulate_in(parameters)

    def unwrap(self, model: torch.nn.Module) -> Any:
        return self.accelerator.unwrap_model(model)

    # --- one window ---

    @contextlib.contextmanager
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> Iterator[None]:
        if list(models) != [self._engine]:
            raise EngineError(
                "accumulate() got a model that is not the one prepare() returned; DeepSpeed would "
                "not see its gradients"
            )
        self.accelerator.sync_gradients = is_last
        self._reduces = is_last or self.grad_sync == "every-microbatch"
        coalesce = self._reduces_deferred()
        if is_first:
            self._leave_window()
            if coalesce:
                self._window.enter_context(self._engine.coalesce_grad_reduction())
        # While coalescing, leaving the window is the boundary.
        self._engine.set_gradient_accumulation_boundary(is_last and not coalesce)
        yield
        if is_last:
            if coalesce:
                self._compare_usage()
            self._leave_window()

    def _reduces_deferred(self) -> bool:
        """Whether gradients are reduced after a window's last backward and not during it."""
        if self.stage == 1:
            return self.defer_grad_reduction and hasattr(self._engine, "coalesce_grad_reduction")
        return self.stage >= 2 and self.grad_sync == "once-per-window"

    def _leave_window(self) -> None:
        self._is_leaving = True
        try:
            self._window.close()
        finally:
            self._is_leaving = False

    def _reduce_when_leaving_only(self) -> None:
        """Keep a window that an error cut short from reducing when Python cleans up: other ranks do
        not take part."""
        for name in ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3"):
            flush = getattr(self._engine, name, None)
            if flush is not None:
                setattr(
                    self._engine,
                    name,
                    lambda *args, flush=flush: flush(*args) if self._is_leaving else None,
                )

    def retry_blocker(self, is_last: bool) -> str:
        lower = "lower the micro-batch (the effective batch stays)"
        if self.stage == 0:
            return f"ZeRO stage 0 is not made for it; {lower}, or use plain DDP"
        if self.stage == 3:
            return (
                "ZeRO-3 gathers weights from all processes in every forward, so none can run "
                f"one by itself; {lower}"
            )
        if self.equal_micro_batches:
            return (
                f"with grad_sync={self.grad_sync} ZeRO-{self.stage} reduces each micro-batch on "
                f"all processes; {lower}, or use "
                "grad_sync=once-per-window"
            )
        if is_last and not self._reduces_deferred():
            return (
                "it is the last of its window, whose backward exchanges gradients with the other "
                "processes; "
                f"{lower}, or use recover_from_oom=always (with deepspeed 0.19 or newer), which "
                "exchanges after it"
            )
        return ""

    def abort_micro_batch(self, error: Exception) -> None:
        super().abort_micro_batch(error)
        if hasattr(self._engine.optimizer, "exit_backward"):
            # An interrupted backward did not, and the next would count itself as nested in it.
            self._engine.optimizer.exit_backward()

    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        self._engine.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor) -> None:
        self._usage.watch(
            loss, self._compare_usage if self._reduces and not self._reduces_deferred() else None
        )
        self._engine.backward(loss, scale_wrt_gas=False)
        if self.stage == 3 and not self._has_gone_back:
            self._has_gone_back = True
            forget_forwards_alone()

    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float]
    ) -> tuple[float, bool, np.ndarray]:
        if self.stage == 0:
            return self._finish_unsharded(optimizer, numbers)
        table = self.end_window(numbers)
        skipped = self._engine.skipped_steps
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm), self._engine.skipped_steps == skipped, table

    def end_window(self, numbers: Sequence[float]) -> np.ndarray:
        table = self.all_gather_floats([float(self._left_some_out), *numbers])
        self._asks_others = bool(table[:, 0].any())
        self._usage.used.clear()
        return table[:, 1:]

    def _compare_usage(self) -> None:
        """Before gradients are reduced: have all ranks leave out the same parameters, or end.

        They ask each other in the first window, and on as long as any of them leaves one out. A
        rank that does so when nobody asks ends by itself: the others would wait for it, or add up
        what does not belong together.
        """
        if self.world_size == 1:
            return
        used = self._usage.used if self._reduces_deferred() else self._usage.used_now
        unused = self._usage.left_out(used)
        self._left_some_out = self._left_some_out or bool(unused)
        if self._asks_others:
            refuse_difference(self, unused, self.name)
        elif unused:
            refuse(self, unused, self.name)

    def _finish_unsharded(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float]
    ) -> tuple[float, bool, np.ndarray]:
        """Stage 0 steps on whatever the gradient is: take the norm and decide before, and let it
        clip by its config."""
        norm = math.sqrt(self._square_sum(list(self._engine.module.parameters())))
        table = self.end_window([float(not math.isfinite(norm)), *numbers])
        if table[:, 0].any():
            self.discard_window_grads(optimizer)
            return norm, False, table[:, 1:]
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        return norm, True, table[:, 1:]

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        self._leave_window()
        self._usage.used.clear()
        sharded = self._engine.optimizer
        sharded.zero_grad(set_to_none=True)
        # What DeepSpeed itself does when it skips a step: forget the reduced shards, and begin
        # counting micro-steps anew.
        if self.stage in (1, 2) and hasattr(sharded, "averaged_gradients"):
            for key in sharded.averaged_gradients:
                sharded.averaged_gradients[key] = sharded.all_grad_tensors[key] = None
            sharded.micro_step_id = -1
        elif self.stage == 3:
            sharded.averaged_gradients = {}
            sharded.micro_step_id = 0

    # --- whole tensors ---

    def full_gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        named = [(name, p) for name, p in self.unwrap(model).named_parameters() if p.requires_grad]
        if self.stage == 0:
            return {name: p.grad.detach() for name, p in named if p.grad is not None}
        return {
            name: gradient for name, p in named if (gradient := safe_get_full_grad(p)) is not None
        }

    def _whole_weight(self, parameter: torch.Tensor) -> torch.Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad and self.stage > 0:
            return safe_get_full_fp32_param(parameter)
        if self.stage < 3:
            return parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        if self.stage == 0:
            super()._set_weight(parameter, value)
            return
        safe_set_full_fp32_param(parameter, value.to(self.device))
        # The copy that the forward uses is made from the master copy at a step only.
        gathered = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0, enabled=self.stage == 3
        )
        with torch.no_grad(), gathered:
            parameter.copy_(value)

    def full_optimizer_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer
    ) -> dict[str, Any]:
        self._link_states()
        return super().full_optimizer_state(model, optimizer)

    def _link_states(self) -> None:
        """Have DeepSpeed find the state of each parameter in its flat shards; by itself it looks
        once, when the first of several parameter groups has stepped and the others have none."""
        if self.stage in (1, 2) and hasattr(
            self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"
        ):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _parameter_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return super()._parameter_state(optimizer, parameter)
        if not parameter.requires_grad:
            return {}
        keys = self._state_keys()
        return {
            key: self._inner_states()[0][key]
            if scalar
            else safe_get_full_optimizer_state(parameter, key)
            for key, scalar in keys.items()
        }

    def _set_parameter_state(
        self,
        optimizer: AcceleratedOptimizer,
        parameter: torch.Tensor,
        state: dict[str, torch.Tensor],
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.stage == 0:
            super()._set_parameter_state(optimizer, parameter, state)
            return
        if not self._inner_states():
            self._make_inner_states(state)
        for key, value in state.items():
            if value.ndim == 0:
                for inner in self._inner_states():
                    inner[key] = value.clone()
            else:
                safe_set_full_optimizer_state(parameter, value.to(self.device), key)

    def _inner_states(self) -> list[dict[str, Any]]:
        """State of the torch optimizer's flat shards, which its first step makes."""
        return [state for state in self._engine.optimizer.optimizer.state.values() if state]

    def _shards(self) -> list[torch.Tensor]:
        """This rank's flat part of the trained weights, which the torch optimizer steps."""
        sharded = self._engine.optimizer
        return (
            sharded.fp32_partitioned_groups_flat
            if self.stage == 3
            else sharded.single_partition_of_fp32_groups
        )

    def _stepped(self, optimizer: AcceleratedOptimizer) -> list[torch.Tensor]:
        if self.stage == 0:
            return super()._stepped(optimizer)
        return [] if self._inner_states() else self._shards()

    def _make_inner_states(self, like: dict[str, torch.Tensor]) -> None:
        """Make the flat shards' state as a first step would, to be filled in."""
        sharded = self._engine.optimizer
        for shard in self._shards():
            sharded.optimizer.state[shard] = {
                key: value.clone() if value.ndim == 0 else torch.zeros_like(shard)
                for key, value in like.items()
            }
        self._link_states()

    def _state_keys(self) -> dict[str, bool]:
        """Keys of the optimizer's state, and whether each is one number for all parameters."""
        states = self._inner_states()
        return (
            {key: not torch.is_tensor(v) or v.ndim == 0 for key, v in states[0].items()}
            if states
            else {}
        )

    def state_dict(self) -> dict[str, Any]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return (
            {"loss_scale": float(scaler.cur_scale)}
            if self.mixed_precision == "fp16" and scaler is not None
            else {}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "loss_scale" in state:
            self._engine.optimizer.loss_scaler.cur_scale = state["loss_scale"]


# What `discard_window_grads` and the checkpoints read and write of DeepSpeed's own objects, by
# stage: names that may change.
_NAMES = {
    1: (
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "single_partition_of_fp32_groups",
    ),
    2: (
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "single_partition_of_fp32_groups",
    ),
    3: ("averaged_gradients", "micro_step_id", "fp32_partitioned_groups_flat"),
}


def check_names(sharded: Any, stage: int) -> None:
    """Raise an EngineError on all ranks if this DeepSpeed's optimizer lacks a name that is relied
    on.

    Found later, in a window that one rank drops, the others would wait for it.
    """
    is_zero = type(sharded).__name__.startswith(
        "DeepSpeedZeroOptimizer"
    )  # bf16 at stage 1 has another, which keeps none
    missing = [name for name in _NAMES.get(stage, ()) if not hasattr(sharded, name)]
    if is_zero and missing:
        raise EngineError(
            f"deepspeed {version('deepspeed')} keeps ZeRO-{stage}'s state in another way than is "
            "known here (no "
            f"{', '.join(missing)}); use deepspeed >=0.16,<0.21, or another engine"
        )


def forget_forwards_alone() -> None:
    """ZeRO-3 remembers for good which weights each module may release, from the first passes that
    it watched. Passes without a backward, such as the proof of the loss path, teach it to release
    them all, and each backward would gather every weight anew (a cache that outlives its trace:
    partitioned_param_coordinator.py, __params_to_release)."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    remembered = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in (
        getattr(remembered, "__closure__", None) or ()
    ):  # DeepSpeed's timing decorator lies around the cache
        getattr(cell.cell_contents, "cache_clear", lambda: None)()


def make_plugin(
    zero_stage: int | None,
    cpu_offload: bool,
    mixed_precision: str | None,
    plugin: DeepSpeedPlugin | None,
) -> DeepSpeedPlugin:
    """The plugin of the user or of the launcher's file, or a new one, with `zero_stage` in it;
    "auto" elsewhere.

    Raises:
        ConfigError: the launcher or its file says another stage, or another precision than
            `mixed_precision`.
        EngineError: DeepSpeed is not installed.
    """
    check_installed()
    path = os.environ.get(CONFIG_FILE_VARIABLE, "none")
    if plugin is not None:
        config = plugin.deepspeed_config
    elif path != "none":
        config = _read_file(path)
        _refuse_ignored_fields(path)
    elif "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ:
        plugin = DeepSpeedPlugin()  # what accelerate's launcher says in its variables
        config = plugin.deepspeed_config
    else:
        config = {}
    zero = config.setdefault("zero_optimization", {})
    _agree(
        zero, "stage", 2 if zero_stage is None and "stage" not in zero else zero_stage, "zero_stage"
    )
    for dtype in ("bf16", "fp16"):  # accelerate would take the file's word for ours
        if (
            mixed_precision is not None
            and config.get(dtype, {}).get("enabled") is True
            and mixed_precision != dtype
        ):
            raise ConfigError(
                f"mixed_precision={mixed_precision}, but {_where()} enables {dtype}; make them "
                "agree"
            )
    for device in ("optimizer", "param"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{device.upper()}_DEVICE", "none") == "cpu":
            zero.setdefault(f"offload_{device}", {"device": "cpu"})
    if cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    # Missing, it would become 1 in silence and beat everybody else's; the micro-batch must be a
    # number for accelerate.
    config.setdefault("gradient_accumulation_steps", "auto")
    config.setdefault("train_micro_batch_size_per_gpu", "auto")
    return plugin if plugin is not None else DeepSpeedPlugin(hf_ds_config=config)


def file_precision() -> str:
    """The precision that the launcher's DeepSpeed file turns on, where there is one: `no`, `bf16`
    or `fp16`."""
    path = os.environ.get(CONFIG_FILE_VARIABLE, "none")
    config = _read_file(path) if path != "none" else {}
    return next(
        (dtype for dtype in ("bf16", "fp16") if config.get(dtype, {}).get("enabled") is True), "no"
    )


def _read_file(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the DeepSpeed configuration {path} cannot be read: {error}") from None


def _refuse_ignored_fields(path: str) -> None:
    """Beside a DeepSpeed file accelerate reads these from nowhere else, and stops with a traceback
    where it finds them."""
    only_there = {
        *(
            "gradient_accumulation_steps",
            "gradient_clipping",
            "zero_stage",
            "mixed_precision",
            "zero3_save_16bit_model",
        ),
        *(
            f"offload_{what}_{where}"
            for what in ("optimizer", "param")
            for where in ("device", "nvme_path")
        ),
    }
    stated = sorted(only_there & set(os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")))
    if stated:
        raise ConfigError(
            f"the accelerate configuration has {', '.join(stated)} beside "
            f"deepspeed_config_file={path}, which accelerate "
            f"would not read; write it in {path} and take it out of the other"
        )


def _complete(
    config: dict[str, Any], plan: BatchPlan, settings: Settings, mixed_precision: str
) -> None:
    """Fill in what is missing or "auto"; what is there and decides the update must agree."""
    _agree(config, "train_micro_batch_size_per_gpu", plan.micro_batch_size, "micro_batch_size")
    _agree(
        config,
        "gradient_accumulation_steps",
        plan.gradient_accumulation_steps,
        "gradient_accumulation_steps",
    )
    # DeepSpeed asks that it be the product; what an update sees is ours to say.
    product = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size
    _agree(config, "train_batch_size", product, "global_batch_size, rounded up to micro-batches,")
    _agree(config, "gradient_clipping", settings.max_grad_norm or 0.0, "max_grad_norm")
    for dtype in ("bf16", "fp16"):
        _agree(
            config.setdefault(dtype, {}),
            "enabled",
            mixed_precision == dtype,
            f"mixed_precision={dtype}",
        )
    if mixed_precision == "bf16":
        # ZeRO's default is the weights' dtype, in which 256 + 1 - 256 is 0.
        wanted = "fp32" if settings.accumulation_dtype == "float32" else "bf16"
        _agree(
            config.setdefault("data_types", {}), "grad_accum_dtype", wanted, "accumulation_dtype"
        )
        config["bf16"].setdefault("check_grad_overflow", True)
    # The user's torch optimizer is used as it is: any of them, and not DeepSpeed's own Adam in its
    # place when offloaded.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def _agree(section: dict[str, Any], key: str, ours: Any, name: str) -> None:
    """Set section[key] where it is missing or "auto"; otherwise it must be `ours` (None: no
    opinion)."""
    theirs = section.get(key, "auto")
    if theirs in ("auto", None):
        if ours is not None:
            section[key] = ours
    elif ours is not None and theirs != ours:
        raise ConfigError(
            f'{name}={ours}, but {_where()} says {key}={theirs}; make them agree, or write "auto" '
            "there"
        )


def _where() -> str:
    return os.environ.get(CONFIG_FILE_VARIABLE, "the DeepSpeed configuration")


def check_installed() -> None:
    """Raise an EngineError with the install command where DeepSpeed is missing."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"DeepSpeed is asked for but not installed ({error}); {INSTALL}"
        ) from None


def process_group_kwargs() -> list[Any]:
    """On a machine without GPUs DeepSpeed finds its processes over gloo; accelerate has to be
    told."""
    return [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
