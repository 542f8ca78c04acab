"""Which settings of a DeepSpeed configuration leave an update as it is; all others are refused.

DeepSpeed applies what its configuration says over what a loop does, and at the top level passes
over names that it does not know. So a setting is taken only if it is known here to change speed,
memory or what is printed. Tried on a CPU against float64 with deepspeed 0.19.8: `scheduler` steps
the learning rate behind the loop's back, `gradient_allreduce_op=sum` doubles a gradient of two
processes (which clipping hides), `torch_autocast` and `communication_data_type` round to 16 bits,
and with `round_robin_gradients` weights are right and read back in another order. Knows DeepSpeed's
names; no engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from accum_trainer.errors import ConfigError

# Taken here: with any value, or compared with the loop's by `zero_config.complete`.
_TAKEN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "steps_per_print", "dump_state", "memory_breakdown"),
    "zero_allow_untested_optimizer",
    *("disable_allgather", "disable_python_gc", "dataloader_drop_last", "log_level", "timers"),
    *("comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "monitor_config"),
    *("aio", "activation_checkpointing", "checkpoint", "comms_config"),
    *("zero_optimization", "fp16", "bf16", "data_types", "compile"),  # looked into below
}
# Sections, with the names in them that are taken likewise.
_SECTIONS = {
    "zero_optimization": {
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"),
        *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size"),
        *("overlap_comm", "load_from_fp32_weights", "elastic_checkpoint", "sub_group_size"),
        *("cpu_offload_use_pin_memory", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
        *("stage3_gather_fp16_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params"),
        *("stage3_allgather_sequential", "ignore_unused_parameters", "parameter_alignment"),
        *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "leaf_module"),
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
        *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
        *("module_granularity_threshold", "use_all_reduce_for_fetch_params"),
        *("allgather_sequential", "offload_param", "offload_optimizer", "zero_hpz_partition_size"),
    },
    "zero_optimization.offload_param": {
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    },
    "zero_optimization.offload_optimizer": {
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write"),
        *("pipeline", "fast_init", "cpuadam_cores_perc"),
    },
    "fp16": {
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"),
        *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    },
    "bf16": {"enabled", "check_grad_overflow", "immediate_grad_update"},
    "data_types": {"grad_accum_dtype"},
    "compile": set(),
}
# Other settings that hold more than one value.
_OBJECTS = ("activation_checkpointing", "checkpoint", "aio", "comms_logger", "tensorboard", "wandb")
# How people write remarks into JSON.
_COMMENTS = ("_", "//", "#", "comment")
# What the others do, where it is known.
_WHY = {
    "optimizer": "makes another optimizer than the loop's",
    "scheduler": "sets the learning rate behind the loop's schedule",
    "gradient_allreduce_op": "adds the processes' gradients up instead of averaging them",
    "communication_data_type": "rounds gradients while they are added up",
    "torch_autocast": "computes in another precision than mixed_precision says",
    "amp": "computes in another precision than mixed_precision says",
    "zero_optimization.round_robin_gradients": "orders weights in another way than DeepSpeed's own "
    "readers, and checkpoints would mix them up",
    "zero_optimization.compute_grad_norm": "leaves the gradient's norm out",
    "zero_optimization.cpu_offload": "is a former name: write offload_optimizer with device cpu",
    "zero_optimization.cpu_offload_params": "is a former name: write offload_param with device cpu",
    "zero_optimization.cpu_offload_param": "is a former name: write offload_param with device cpu",
    "zero_force_ds_cpu_optimizer": "replaces the loop's optimizer",
    "wall_clock_breakdown": "times DeepSpeed's own loop, and ends any other",
    "flops_profiler": "times DeepSpeed's own loop, and ends any other",
    "elasticity": "chooses another batch",
}


def check_shape(config: Any, source: str) -> dict[str, Any]:
    """A DeepSpeed configuration whose sections are sections: those that are null are taken out.

    Raises:
        ConfigError: it is no object, or a section is something else.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"{source} is {_short(config)!r}; a DeepSpeed configuration is an object")
    for section in (*_SECTIONS, *_OBJECTS):
        *outer, name = section.split(".")
        holder = config.get(outer[0], {}) if outer else config
        value = holder.get(name, {})
        if value is None:
            del holder[name]
        elif not isinstance(value, dict):
            raise ConfigError(f"{source} says {section}={_short(value)!r}; write an object there")
    return config


def refuse_other_settings(config: dict[str, Any], source: str) -> None:
    """Raise a ConfigError for the first setting that may change an update, or that DeepSpeed would
    pass over.

    Args:
        config: DeepSpeed's, of the right shape. What "auto" would turn on is turned off.
        source: names it in the message.
    """
    for name, value in _settings(config):
        if isinstance(value, dict) and value.get("enabled") == "auto":
            value["enabled"] = False
        if _is_off(name, value) or name.startswith(_COMMENTS):
            continue
        known = {*_TAKEN, *(f"{s}.{n}" for s, names in _SECTIONS.items() for n in names)}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        kind = name.rpartition(".")[2]
        if name in _WHY:
            why = _WHY[name]
        elif "quantize" in kind:
            why = "rounds what processes send to each other"
        else:
            why = "is not known to leave an update as it is" + (
                f" (did you mean {near[0]}?)" if near else ""
            )
        raise ConfigError(f"{source} says {name}={_short(value)}, which {why}; leave it out")


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that are not taken with any value, those of sections by `section.name`."""
    yield from ((name, value) for name, value in config.items() if name not in _TAKEN)
    for section, names in _SECTIONS.items():
        found: Any = config
        for part in section.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict):
            yield from ((f"{section}.{n}", v) for n, v in found.items() if n not in names)


# What means "off", beside false and a section that is not enabled.
_OFF = {
    "gradient_allreduce_op": "mean",
    "communication_data_type": "fp32",
    "seq_parallel_communication_data_type": "fp32",
    "managed_gradient_accumulation": True,
    "gradient_predivide_factor": 1,
    "sequence_parallel_size": 1,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.offload_optimizer.ratio": 1,
}


def _is_off(name: str, value: Any) -> bool:
    if name in _OFF:
        return value is None or value == _OFF[name]
    if value is None or value is False:
        return True
    return isinstance(value, dict) and value.get("enabled", bool(value)) is False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
