"""DeepSpeed's JSON: read, checked against the plan and the settings, completed.

DeepSpeed takes the batch, K, clipping, stage and precision from its configuration, silently and
over everything else. Entries that are missing or "auto" are filled in; an entry that contradicts
the caller is an error that names both. It knows configuration only, no process and no model.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.settings import Settings
from accum_trainer.engine.zero_settings import check_shape, refuse_other_settings
from accum_trainer.errors import ConfigError, EngineError

INSTALL = "pip install 'accum-trainer[deepspeed]'"
_OLDEST = (0, 19, 8)
_PERSISTENT = "stage3_param_persistence_threshold"
# Each group of so many processes keeps a second copy of the weights, for the backward (ZeRO++).
_GROUPS = "zero_hpz_partition_size"
CONFIG_FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


_STAGES = {name: stage for stage in range(4) for name in (stage, f"{stage}", f"zero{stage}")}


def _stage_number(zero_stage: int | str) -> int:
    """The stage that is written 2, "2" or "zero2"."""
    if isinstance(zero_stage, bool) or zero_stage not in _STAGES:
        raise ConfigError(
            f"zero_stage={zero_stage!r} is not known; give 0, 1, 2 or 3, or zero0 to zero3"
        )
    return _STAGES[zero_stage]


def make_plugin(
    zero_stage: int | str | None,
    cpu_offload: bool,
    mixed_precision: str | None,
    plugin: DeepSpeedPlugin | None,
) -> DeepSpeedPlugin:
    """The plugin of the user or of the launcher's file, or a new one, with `zero_stage` in it;
    "auto" for values that are known later.

    Raises:
        ConfigError: an unknown stage; the launcher or its file says another stage, or another
            precision than `mixed_precision`.
        EngineError: DeepSpeed is not installed.
    """
    if zero_stage is not None:
        zero_stage = _stage_number(zero_stage)
    _check_installed()
    path = os.environ.get(CONFIG_FILE_VARIABLE, "none")
    if plugin is not None:
        config = check_shape(plugin.deepspeed_config, _source())
    elif path != "none":
        config = _read_file(path)
        _refuse_ignored_fields(path)
    elif "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ:
        plugin = DeepSpeedPlugin()  # reads the variables of accelerate's launcher
        config = plugin.deepspeed_config
    else:
        config = {}
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage", "auto") not in ("auto", None):
        zero["stage"] = _stage_number(zero["stage"])
    stage = 2 if zero_stage is None and "stage" not in zero else zero_stage
    _agree(zero, "stage", stage, f"engine=zero{stage}, zero_stage")
    for dtype in ("bf16", "fp16"):  # accelerate would take the file's precision
        if (
            mixed_precision is not None
            and config.get(dtype, {}).get("enabled") is True
            and mixed_precision != dtype
        ):
            raise ConfigError(
                f"mixed_precision={mixed_precision}, but {_source()} enables {dtype}; make them "
                "agree"
            )
    for device in ("optimizer", "param"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{device.upper()}_DEVICE", "none") == "cpu":
            zero.setdefault(f"offload_{device}", {"device": "cpu"})
    if cpu_offload:
        place = zero.setdefault("offload_optimizer", {})
        if place.get("device", "auto") in ("auto", None):
            place["device"] = "cpu"
        if _place_of(zero, "optimizer") == "none":
            raise ConfigError(
                f"cpu_offload=True, but {_source()} sets offload_optimizer's device to none, as "
                "accelerate's launcher does unless it is told; set offload_optimizer_device: cpu "
                "there, or leave cpu_offload out"
            )
    # A missing K would silently become 1 and override every other source; a missing micro-batch
    # stops accelerate, which needs a number.
    config.setdefault("gradient_accumulation_steps", "auto")
    config.setdefault("train_micro_batch_size_per_gpu", "auto")
    return plugin if plugin is not None else DeepSpeedPlugin(hf_ds_config=config)


def file_precision() -> str:
    """The precision that the launcher's DeepSpeed file turns on: `no` (or no file), `bf16` or
    `fp16`."""
    path = os.environ.get(CONFIG_FILE_VARIABLE, "none")
    config = _read_file(path) if path != "none" else {}
    return next(
        (dtype for dtype in ("bf16", "fp16") if config.get(dtype, {}).get("enabled") is True), "no"
    )


def _read_file(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the DeepSpeed configuration {path} cannot be read: {error}") from None
    return check_shape(config, path)


def _refuse_ignored_fields(path: str) -> None:
    """Raise a ConfigError for fields that accelerate takes from a DeepSpeed file only; if it finds
    them beside one, it stops with a traceback."""
    only_there = {
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_stage",
        "mixed_precision",
        "zero3_save_16bit_model",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
    }
    stated = sorted(only_there & set(os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")))
    if stated:
        raise ConfigError(
            f"the accelerate configuration has {', '.join(stated)} beside "
            f"deepspeed_config_file={path}, which accelerate would not read; write it in {path} "
            "and take it out of the other"
        )


def complete(
    config: dict[str, Any], plan: BatchPlan, settings: Settings, mixed_precision: str
) -> None:
    """Fill in entries that are missing or "auto"; others that decide the update must agree.

    Raises:
        ConfigError: an entry contradicts the plan or the settings, may change an update, or would
            have no effect.
    """
    check_shape(config, _source())  # one's own Accelerator brings a configuration unseen
    refuse_other_settings(config, _source())
    _refuse_idle_offload(config)
    _agree(config, "train_micro_batch_size_per_gpu", plan.micro_batch_size, "micro_batch_size")
    _agree(
        config,
        "gradient_accumulation_steps",
        plan.gradient_accumulation_steps,
        "gradient_accumulation_steps",
    )
    # DeepSpeed requires the product of the three; the samples of an update are ours to choose.
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
    # ZeRO's default is the weights' dtype; in bf16, 256 + 1 - 256 is 0.
    wanted = "fp32" if settings.accumulation_dtype == "float32" else "bf16"
    types = config.setdefault("data_types", {})
    if mixed_precision == "bf16" or "grad_accum_dtype" in types:
        _agree(types, "grad_accum_dtype", wanted, "accumulation_dtype")
    if mixed_precision == "bf16":
        _agree(config["bf16"], "check_grad_overflow", True, "check_grad_overflow")
    # Any torch optimizer of the user's is used as it is. DeepSpeed would replace an offloaded Adam
    # by its own.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def weights_are_set(config: dict[str, Any]) -> str:
    """The setting by which the configuration itself decides which weights stage 3 keeps whole; ""
    if it has none."""
    zero = config["zero_optimization"]
    threshold = zero.get(_PERSISTENT, "auto")
    if threshold != "auto":
        return f"{_source()} says {_PERSISTENT}={threshold}"
    size = zero.get(_GROUPS)
    if isinstance(size, int) and size > 1:
        return f"{_source()} says {_GROUPS}={size}"
    device = _place_of(zero, "param")
    return f"{_source()} says offload_param to {device}" if device != "none" else ""


def offloaded(config: dict[str, Any]) -> str:
    """In words, what the configuration keeps off the device; "" for nothing."""
    zero = config["zero_optimization"]
    found = (
        (what, _place_of(zero, kind))
        for kind, what in (("param", "weights"), ("optimizer", "optimizer state"))
    )
    places = {"cpu": "in host memory", "nvme": "on NVMe"}
    return ", ".join(f"{what} {places.get(at, at)}" for what, at in found if at != "none")


def _place_of(zero: dict[str, Any], kind: str) -> str:
    """Where what is offloaded goes, of `optimizer` or `param`; `none` if it is not."""
    return str((zero.get(f"offload_{kind}") or {}).get("device") or "none")


def _refuse_idle_offload(config: dict[str, Any]) -> None:
    """Raise a ConfigError for what is to be offloaded and is not, at this stage."""
    zero = config["zero_optimization"]
    if zero.get("stage") == 0 and (what := offloaded(config)):
        raise ConfigError(
            f"ZeRO stage 0 shards nothing, so {what} would have no effect; use stage 1, 2 or 3, or "
            "leave cpu_offload and offload_optimizer out"
        )
    if zero.get("stage") in (1, 2) and (place := _place_of(zero, "param")) != "none":
        raise ConfigError(
            f"{_source()} says offload_param to {place}, which stage 3 alone uses; use stage 3, or "
            "leave it out"
        )


def keep_weights(config: dict[str, Any], numbers: int) -> None:
    """Have stage 3 keep every weight of a model of `numbers` whole between steps."""
    config["zero_optimization"][_PERSISTENT] = numbers


def _agree(section: dict[str, Any], key: str, ours: Any, name: str) -> None:
    """Set section[key] if it is missing or "auto"; otherwise it must equal `ours`, unless that is
    None."""
    theirs = section.get(key, "auto")
    if theirs in ("auto", None):
        if ours is not None:
            section[key] = ours
    elif ours is not None and theirs != ours:
        raise ConfigError(
            f'{name}={ours}, but {_source()} says {key}={theirs}; make them agree, or write "auto" '
            "there"
        )


def _source() -> str:
    return os.environ.get(CONFIG_FILE_VARIABLE, "the DeepSpeed configuration")


def _check_installed() -> None:
    """Raise an EngineError with the install command if DeepSpeed is missing or too old."""
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f"DeepSpeed is asked for but not installed ({error}); {INSTALL}"
        ) from None
    if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < _OLDEST:
        raise EngineError(
            f"deepspeed {deepspeed.__version__} is too old: 0.19.1 stepped with gradients of "
            "float32 weights that are not finite, and 0.19.8 is the oldest that is known not to; "
            f"{INSTALL}"
        )
