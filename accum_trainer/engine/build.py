"""From a request to the engine in force, or an EngineError that says what is in force instead.

accelerate falls back silently: it ignores fp16 on a CPU, processes that a launcher did not start, a
K in the environment that overrides the constructor's. Each such fall-back is an error here.
"""

from __future__ import annotations

import atexit
import difflib
import os
import time
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator

from accum_trainer.engine.base import Engine
from accum_trainer.engine.ddp import DDPEngine
from accum_trainer.engine.fsdp import FSDPEngine
from accum_trainer.engine.lost_processes import launched_processes, refuse_lost_processes
from accum_trainer.engine.mesh import refuse_shared_samples, sizes_of
from accum_trainer.engine.request import Request
from accum_trainer.engine.single import SingleEngine
from accum_trainer.engine.sync import AUTO, Syncs
from accum_trainer.engine.zero import ZeroEngine
from accum_trainer.engine.zero_config import CONFIG_FILE_VARIABLE, file_precision
from accum_trainer.errors import ConfigError, EngineError

# The registry: the first that drives what accelerate runs is in force.
ENGINES: tuple[type[Engine], ...] = (ZeroEngine, FSDPEngine, DDPEngine, SingleEngine)
K_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def build_engine(
    *,
    gradient_accumulation_steps: int | None,
    grad_sync: str = AUTO,
    weight_sync: str = AUTO,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Engine:
    """Build (or adopt) an Accelerator and return the engine that drives it.

    Args:
        gradient_accumulation_steps: the K asked for, compared with every other source of K; None
            if it follows from the global batch.
        grad_sync, weight_sync: `auto`, `once-per-window` or `every-microbatch`.
        accelerator: the user's own; by default one is made from `options`.
        options: of an engine (`Engine.options`: `zero_stage`, 0 to 3; `cpu_offload`, which keeps
            ZeRO's optimizer state, or FSDP2's shards, in host memory; `fsdp`; `shard_size`, the
            processes over which FSDP2 shards the model), each of which the launcher may ask for
            too; `engine`, the name of the one that must be in force; others are for
            `Accelerator(...)`.

    Raises:
        ConfigError: another source says another K; an unknown policy or engine; an Accelerator and
            arguments for one; two engines.
        EngineError: the engine in force is not the one asked for, or none of ours.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise EngineError(
            f"torch {torch.__version__} is too old: before 2.11 gradients have their weights' "
            "dtype, so they could not accumulate in float32; pip install 'torch>=2.11'"
        )
    syncs = Syncs(grad_sync, weight_sync)
    given = sorted(name for name, v in options.items() if v is not None and v is not False)
    if accelerator is not None and given:
        raise ConfigError(
            f"accelerator is given together with {', '.join(given)}; pass these to your "
            "Accelerator(...) instead"
        )
    request = _request(options)
    _check_environment(gradient_accumulation_steps)
    launched = launched_processes()
    refuse_lost_processes()
    asked_for = [kind for kind in ENGINES if kind.is_asked_for(request)]
    if request.engine is not None:
        _check_request(request, asked_for, launched)
    if accelerator is None:
        accelerator = _new_accelerator(request, asked_for)
    else:
        _check_steps(gradient_accumulation_steps, accelerator)
    _check_in_force(accelerator, launched)
    if (parallelism := getattr(accelerator, "parallelism_config", None)) is not None:
        refuse_shared_samples(sizes_of(parallelism))
    if accelerator.num_processes > 1:
        atexit.unregister(_let_gloo_finish)  # once, for any number of engines in a process
        atexit.register(_let_gloo_finish)
    for kind in ENGINES:
        if kind.drives(accelerator, request):
            _refuse_without_effect(request, kind)
            engine = kind.on(accelerator, syncs, request)
            if request.engine not in (None, engine.name):
                raise EngineError(
                    f"engine={request.engine} was asked for, but {engine.name} is in force: "
                    f"accelerate runs {accelerator.distributed_type.value} on "
                    f"{engine.world_size} process{'es' if engine.world_size > 1 else ''}; leave "
                    "engine out, or start "
                    + (
                        f"the processes as {request.engine} needs them"
                        if engine.world_size > 1
                        else "the process without a launcher such as torchrun"
                    )
                )
            return engine
        if kind in asked_for:
            raise EngineError(
                f"{kind.name} was asked for, but accelerate runs "
                f"{accelerator.distributed_type.value}"
            )
    raise EngineError(
        f"accelerate runs {accelerator.distributed_type.value}, for which accum_trainer has no "
        "engine; launch a single process, DDP, DeepSpeed or FSDP2"
    )


def _refuse_without_effect(request: Request, kind: type[Engine]) -> None:
    """Raise a ConfigError for an option of another engine than `kind`, the one in force."""
    for name, value in request.options.items():
        if name not in kind.options:
            takers = {
                engine
                for other in ENGINES
                if name in other.options
                for engine in other.asked_for_as
            } - {"zero0"}  # which shards nothing
            raise ConfigError(
                f"{name}={value} has no effect: {kind.name} is in force; give engine "
                f"({', '.join(sorted(takers))}), or leave {name} out"
            )


def check_arguments(given: Iterable[str], taker: type) -> None:
    """Raise a ConfigError, with the nearest known name, for an argument of `taker` that neither it,
    an engine nor `Accelerator(...)` takes."""
    own = [name for name, p in signature(taker).parameters.items() if p.kind is p.KEYWORD_ONLY]
    own += ["engine", *(name for kind in ENGINES for name in kind.options)]
    known = [*own, *signature(Accelerator).parameters]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{taker.__name__} has no argument {name!r}"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" It takes {', '.join(own)}, and the arguments of accelerate's Accelerator"
            )


def _request(options: dict[str, Any]) -> Request:
    """Options that are given, those of engines apart from those of accelerate; with those that a
    named engine stands for.

    Raises:
        ConfigError: an unknown name, or one that contradicts an option.
    """
    ours = {name for kind in ENGINES for name in kind.options}
    name = options.pop("engine", None)
    given = {k: v for k, v in options.items() if k in ours and v is not None and v is not False}
    for flag in ("fsdp", "cpu_offload"):
        if given.get(flag, True) is not True:
            raise ConfigError(f"{flag}={given[flag]!r} is neither True nor False; give one of them")
    if name is not None:
        kind = _engine_of(name)
        for option, value in kind.asked_for_as[name].items():
            if option in given and str(given[option]).removeprefix("zero") != str(value):
                raise ConfigError(
                    f"engine={name}, but {option}={given[option]}; make them agree, or leave one "
                    "out"
                )
            given[option] = value
    return Request(given, {k: v for k, v in options.items() if k not in ours}, engine=name)


def _engine_of(name: Any) -> type[Engine]:
    known = {text: kind for kind in ENGINES for text in kind.asked_for_as}
    if name not in known:
        raise ConfigError(f"engine={name!r} is not known; give one of {', '.join(sorted(known))}")
    return known[name]


def _check_request(request: Request, asked_for: list[type[Engine]], launched: int) -> None:
    """Raise a ConfigError if the engine named in `request` is not the only one asked for, or cannot
    be in force on the `launched` processes."""
    named = _engine_of(request.engine)
    for other in asked_for:
        if other is not named:
            options = [f"{k}={v}" for k, v in request.options.items() if k in other.options]
            where = request.where(other.library) or ", ".join(options)
            raise ConfigError(
                f"engine={request.engine}, but {where} asks for {other.name}; make them agree, or "
                "leave one out"
            )
    if refusal := named.refusal(launched):
        raise ConfigError(
            f"engine={request.engine} on {launched} process{'es' if launched > 1 else ''}: "
            f"{refusal}"
        )


def _new_accelerator(request: Request, asked_for: list[type[Engine]]) -> Accelerator:
    if len(asked_for) > 1:
        names = " and ".join(kind.name for kind in asked_for)
        raise ConfigError(f"{names} are both asked for; choose one")
    kind = asked_for[0] if asked_for else SingleEngine
    kwargs = kind.accelerator_kwargs(request)
    try:
        # K is ours to apply: accelerate's stays 1, unless its environment variable repeats ours.
        return Accelerator(**kwargs)
    except (ValueError, TypeError) as error:
        given = ", ".join(sorted(request.accelerator_kwargs)) or "to start"
        raise EngineError(f"accelerate refuses {given}: {error}") from None


def _check_steps(gradient_accumulation_steps: int | None, accelerator: Accelerator) -> None:
    """Refuse an Accelerator whose K is neither 1 nor ours."""
    theirs = accelerator.gradient_accumulation_steps
    if gradient_accumulation_steps is not None and theirs not in (1, gradient_accumulation_steps):
        raise ConfigError(
            f"gradient_accumulation_steps={gradient_accumulation_steps}, but the Accelerator "
            f"passed in has gradient_accumulation_steps={theirs}; make them agree, or leave the "
            "Accelerator's out"
        )


def _let_gloo_finish() -> None:
    """Give gloo's threads time to release the last tensors that they sent before the interpreter
    ends.

    They need its lock for that, and a thread that asks for it too late aborts a run that has ended
    well ("terminate called without an active exception", one of seven such processes on two busy
    cores). Ending the process group does not help: the model's wrapper holds it, and no event marks
    the release.
    """
    time.sleep(0.2)


def choose_precision(mixed_precision: str | None, amp: bool, cpu: bool) -> str:
    """The autocast dtype in force: `no`, `bf16` or `fp16`.

    `amp` takes the best of this device. If the user names none, the launcher's holds; if both name
    one and differ, it is an error.

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
    """Refuse a K in accelerate's environment variable that is not ours: it would silently override
    the constructor's."""
    stated = os.environ.get(K_VARIABLE)
    if (
        stated is None
        or gradient_accumulation_steps is None
        or stated == str(gradient_accumulation_steps)
    ):
        return
    raise ConfigError(
        f"gradient_accumulation_steps={gradient_accumulation_steps}, but the environment says "
        f"{K_VARIABLE}={stated} (accelerate's launcher sets it); make them agree, or leave it out "
        "of the launch configuration"
    )


def _check_in_force(accelerator: Accelerator, launched: int) -> None:
    if launched != accelerator.num_processes:
        raise EngineError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate sees "
            f"{accelerator.num_processes}: they would train apart from each other; create the "
            "Accelerator after the launcher has set its variables, and with cpu=True if there is "
            "no GPU"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise EngineError(
            "mixed_precision=fp16 needs a GPU; on this CPU accelerate would silently train in "
            "float32. Use mixed_precision=bf16 or no"
        )
