"""The batch arithmetic of a configuration, as lines to print.

Imports no torch; knows neither models nor engines.
"""

from __future__ import annotations

from accum_trainer.batch_plan import BatchPlan, samples_of_shard, scale_lr, warmup_updates
from accum_trainer.config import TrainConfig
from accum_trainer.data.counting import count_rows
from accum_trainer.errors import ConfigError


def sized_plan(config: TrainConfig, processes: int, num_samples: int | None) -> BatchPlan:
    """The batch plan of `config` on `processes` processes, with the number of samples if it is
    given or a data file can be counted.

    Raises:
        ConfigError: sizes that contradict each other, or two sources for the number of samples.
    """
    if num_samples is not None and config.dataset_file is not None:
        raise ConfigError(
            f"num_samples={num_samples} and dataset_file={config.dataset_file} both say how much "
            "data there is; give one"
        )
    if config.dataset_file is not None:
        num_samples = count_rows(config.dataset_file)
    if num_samples is not None and num_samples > 0:  # else the plan refuses it
        num_samples = samples_of_shard(num_samples, config.shard)
    if isinstance(config.batch_size, str):
        raise ConfigError(
            f"batch_size={config.batch_size} is found on the device when training starts; give a "
            "number to plan with"
        )
    return BatchPlan(
        config.batch_size,
        config.gradient_accumulation_steps,
        processes,
        config.global_batch_size,
        num_samples,
    )


def line(name: str, value: str) -> str:
    """A name and its value, aligned with those of the other reports."""
    return f"{name:<28}{value}"


def batch_report(plan: BatchPlan, config: TrainConfig) -> list[str]:
    """B, K, W, effective batch, updates, tail, warm-up and learning rate.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    rows = [*_sizes(plan, config.max_tokens_per_micro_batch), *_epoch(plan), *_rate(plan, config)]
    return [line(name, value) for name, value in rows]


def _sizes(plan: BatchPlan, token_limit: int | None) -> list[tuple[str, str]]:
    if token_limit is not None:
        micro_batch, steps = f"at most {token_limit:,} tokens", "as the samples need"
        effective = f"{plan.global_batch_size}"
    else:
        micro_batch, steps = f"{plan.micro_batch_size}", f"{plan.gradient_accumulation_steps}"
        effective = f"{plan.global_batch_size}   ({plan.describe()})"
    return [
        ("B   micro-batch", micro_batch),
        ("K   accumulation steps", steps),
        ("W   processes", f"{plan.world_size}"),
        ("B_eff  effective batch", effective),
    ]


def _epoch(plan: BatchPlan) -> list[tuple[str, str]]:
    if plan.num_samples is None:
        return []
    tail = "none, all windows are whole"
    if plan.tail_samples:
        tail = f"{plan.tail_samples} samples in the last window"
    return [
        ("samples per epoch", f"{plan.num_samples}"),
        ("updates per epoch", f"{plan.updates_per_epoch}"),
        ("tail", tail),
    ]


def _rate(plan: BatchPlan, config: TrainConfig) -> list[tuple[str, str]]:
    lr = scale_lr(config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size)
    rate = f"{lr:g}"
    if config.lr_scaling != "none":
        rate += f"   ({config.lr_scaling} from {config.lr:g} at {config.lr_base_batch_size})"
    total = config.steps or (
        plan.updates_per_epoch * (config.epochs or 1) if plan.updates_per_epoch else None
    )
    if total is None:
        return [
            ("learning rate", rate),
            ("updates", "unknown: give --steps, --num-samples or --dataset-file"),
        ]
    warmup = warmup_updates(config.warmup, total, plan.updates_per_epoch)
    return [
        ("updates in all", f"{total}"),
        ("warm-up", f"{warmup} updates   (from {config.warmup})"),
        ("learning rate", f"{rate}, {config.scheduler}"),
    ]
