"""From what was asked for to the engine in force, or an EngineError that says what is in force
instead.

accelerate falls back in silence: it ignores fp16 on a CPU, a launcher that lost its processes, a K
in the environment that beats the constructor's. Each such fall-back is an error here.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from accum_trainer.engine.base import Engine
from accum_trainer.engine.ddp import DDPEngine
from accum_trainer.engine.deepspeed import (
    CONFIG_FILE_VARIABLE,
    DeepSpeedEngine,
    file_precision,
    make_plugin,
    process_group_kwargs,
)
from accum_trainer.engine.fsdp import FSDPEngine, refuse_lost_settings
from accum_trainer.engine.lost_processes import refuse_lost_processes
from accum_trainer.engine.single import SingleEngine
from accum_trainer.errors import ConfigError, EngineError

GRAD_SYNCS = ("auto", "once-per-window", "every-microbatch")
K_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def build_engine(
    *,
    gradient_accumulation_steps: int | None,
    grad_sync: str = "auto",
    accelerator: Accelerator | None = None,
    zero_stage: int | None = None,
    cpu_offload: bool = False,
    fsdp: bool = False,
    **accelerator_kwargs: Any,
) -> Engine:
    """Build (or adopt) an Accelerator and return the engine that drives it.

    Args:
        gradient_accumulation_steps: the K asked for, compared with every other source of K; None
            where it follows from the global batch.
        grad_sync: `auto`, `once-per-window` or `every-microbatch`.
        accelerator: the user's own; otherwise one is made from the following.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3; None where it is not asked for here (the launcher
            may).
        cpu_offload: keep ZeRO's optimizer state in host memory.
        fsdp: shard with FSDP2; the launcher may ask for it too.
        accelerator_kwargs: for `Accelerator(...)`.

    Raises:
        ConfigError: another source says another K; an unknown policy; an Accelerator and arguments
            for one.
        EngineError: the engine in force is not the one asked for, or none of ours.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise EngineError(
            f"torch {torch.__version__} is too old: gradients have no dtype of their own before "
            "2.11, "
            "so they could not accumulate in float32; pip install 'torch>=2.11'"
        )
    if grad_sync not in GRAD_SYNCS:
        raise ConfigError(
            f"grad_sync={grad_sync!r} is not known; give one of {', '.join(GRAD_SYNCS)}"
        )
    given = {"zero_stage": zero_stage, "cpu_offload": cpu_offload or None, "fsdp": fsdp or None}
    given = {name: value for name, value in given.items() if value is not None} | accelerator_kwargs
    if accelerator is not None and given:
        raise ConfigError(
            f"accelerator is given together with {', '.join(sorted(given))}; "
            "pass these to your Accelerator(...) instead"
        )
    _check_environment(gradient_accumulation_steps)
    refuse_lost_processes()
    wants_zero = zero_stage is not None or _wants("deepspeed", accelerator_kwargs)
    wants_fsdp = fsdp or _wants("fsdp", accelerator_kwargs)
    if accelerator is None:
        if wants_zero and wants_fsdp:
            raise ConfigError("DeepSpeed ZeRO and FSDP are both asked for; choose one")
        if wants_zero:
            accelerator_kwargs = _for_deepspeed(zero_stage, cpu_offload, accelerator_kwargs)
        accelerator = _new_accelerator(accelerator_kwargs, wants_zero, wants_fsdp)
    elif (
        gradient_accumulation_steps is not None
        and accelerator.gradient_accumulation_steps
        not in (
            1,
            gradient_accumulation_steps,
        )
    ):
        raise ConfigError(
            f"gradient_accumulation_steps={gradient_accumulation_steps}, but the Accelerator "
            "passed in has "
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; make them "
            "agree, or leave the Accelerator's out"
        )
    _check_in_force(accelerator)
    if accelerator.num_processes > 1:
        atexit.unregister(_let_gloo_finish)  # once, however many engines a process builds
        atexit.register(_let_gloo_finish)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedEngine(accelerator, grad_sync)
    if wants_zero:
        raise EngineError(
            f"DeepSpeed was asked for, but accelerate runs {accelerator.distributed_type.value}"
        )
    if wants_fsdp:
        return FSDPEngine(accelerator, grad_sync)
    if accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return DDPEngine(accelerator, grad_sync)
    if accelerator.distributed_type == DistributedType.NO:
        return SingleEngine(accelerator, grad_sync)
    raise EngineError(
        f"accelerate runs {accelerator.distributed_type.value}, for which accum_trainer has no "
        "engine; "
        "launch a single process, DDP, DeepSpeed or FSDP2"
    )


def _let_gloo_finish() -> None:
    """Give gloo's threads the time to let go of the last tensors that they sent, while the
    interpreter is whole.

    They need its lock for that, and one that asks for it later aborts a run that has ended well
    ("terminate called without an active exception", one of seven such processes on two busy cores).
    Ending the process group does not help: the model's wrapper holds it, and nothing says when a
    thread has let go.
    """
    time.sleep(0.2)


def choose_precision(mixed_precision: str | None, amp: bool, cpu: bool) -> str:
    """The autocast dtype in force: `no`, `bf16` or `fp16`.

    `amp` takes the best of this device. Without a word from the user the launcher decides; where
    both name a dtype and differ, neither can win in silence.

    Raises:
        ConfigError: the launcher (ACCELERATE_MIXED_PRECISION, or its DeepSpeed file) names another
            dtype.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    name = f"the launcher says ACCELERATE_MIXED_PRECISION={launcher}"
    if launcher == "no":
        launcher = file_precision()
        name = (
            f"the launcher's DeepSpeed configuration {os.environ.get(CONFIG_FILE_VARIABLE)} "
            f"enables {launcher}"
        )
    if amp:
        on_gpu = torch.cuda.is_available() and not cpu
        mixed_precision = "bf16" if not on_gpu or torch.cuda.is_bf16_supported() else "fp16"
    if mixed_precision is None:
        return launcher
    if launcher not in ("no", mixed_precision):
        raise ConfigError(f"mixed_precision={mixed_precision}, but {name}; make them agree")
    return mixed_precision


def _check_environment(gradient_accumulation_steps: int | None) -> None:
    """Refuse a K in accelerate's environment variable that is not ours: it would beat the
    constructor's in silence."""
    stated = os.environ.get(K_VARIABLE)
    if (
        stated is None
        or gradient_accumulation_steps is None
        or stated == str(gradient_accumulation_steps)
    ):
        return
    raise ConfigError(
        f"gradient_accumulation_steps={gradient_accumulation_steps}, but the environment says "
        f"{K_VARIABLE}={stated} "
        "(accelerate's launcher sets it); make them agree, or leave it out of the launch "
        "configuration"
    )


def _wants(engine: str, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments for an Accelerator, or the launcher's environment, ask for `deepspeed`
    or `fsdp`."""
    return (
        kwargs.get(f"{engine}_plugin") is not None
        or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
    )


def _for_deepspeed(
    zero_stage: int | None, cpu_offload: bool, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments for an Accelerator that runs DeepSpeed; `cpu=True` would make it run DDP in
    silence."""
    if kwargs.get("cpu") and torch.cuda.is_available():
        raise EngineError(
            "DeepSpeed cannot be kept on the CPU where there is a GPU; hide the GPU with "
            "CUDA_VISIBLE_DEVICES="
        )
    if "WORLD_SIZE" not in os.environ:  # DeepSpeed wants a launcher's variables for one process too
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {
                "RANK": 0,
                "LOCAL_RANK": 0,
                "WORLD_SIZE": 1,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free.getsockname()[1],
            }
        os.environ.update({name: str(value) for name, value in alone.items()})
    plugin = make_plugin(
        zero_stage, cpu_offload, kwargs.get("mixed_precision"), kwargs.get("deepspeed_plugin")
    )
    handlers = [*process_group_kwargs(), *kwargs.get("kwargs_handlers", [])]
    kept = {name: value for name, value in kwargs.items() if name != "cpu"}
    return kept | {"deepspeed_plugin": plugin, "kwargs_handlers": handlers}


def _new_accelerator(kwargs: dict[str, Any], wants_zero: bool, wants_fsdp: bool) -> Accelerator:
    if not wants_zero and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        # Without a GPU two processes find each other over gloo only where accelerate is told of the
        # CPU.
        kwargs.setdefault("cpu", True)
    # accelerate has no FSDP on the CPU; the engine shards by itself, on GPUs too, so both are one
    # code
    if wants_fsdp:
        refuse_lost_settings(kwargs.get("fsdp_plugin"))
        kwargs = {name: value for name, value in kwargs.items() if name != "fsdp_plugin"}
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        # K is ours to apply: accelerate's stays 1, unless its environment variable repeats ours.
        return Accelerator(**kwargs)
    except (ValueError, TypeError) as error:
        raise EngineError(f"accelerate refuses {', '.join(sorted(kwargs))}: {error}") from None


def _check_in_force(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise EngineError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate sees "
            f"{accelerator.num_processes}: they would "
            "train apart from each other; create the Accelerator after the launcher set its "
            "variables, and with cpu=True "
            "where there is no GPU"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise EngineError(
            "mixed_precision=fp16 needs a GPU; on this CPU accelerate would train in float32 "
            "without a word. "
            "Use mixed_precision=bf16 or no"
        )
