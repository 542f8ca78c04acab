"""`accum-trainer plan`."""

from __future__ import annotations

import os
from typing import Any

import click

from accum_trainer.batch_plan import BatchPlan, lr_factor, scale_lr, warmup_updates
from accum_trainer.cli.options import SectionedCommand, config_options
from accum_trainer.config import compose
from accum_trainer.data.counting import count_rows
from accum_trainer.errors import ConfigError

_USED = (
    "batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "steps",
    "epochs",
    "dataset_file",
    "lr",
    "lr_scaling",
    "lr_base_batch_size",
    "scheduler",
    "warmup",
)


@click.command(
    "plan",
    cls=SectionedCommand,
    epilog="Example: accum-trainer plan --global-batch-size 64 --batch-size 4 --processes 2 --num-samples 7473 --epochs 3 --warmup 5%",
)
@click.option("--config", "config_file", metavar="FILE", help="YAML with the options of `train`.")
@click.option("--processes", default=1, show_default=True, metavar="W", help="Processes that share the gradient.")
@click.option(
    "--num-samples", default=None, type=int, metavar="N", help="Samples in an epoch, where no --dataset-file says it."
)
@config_options(_USED)
def command(config_file: str | None, processes: int, num_samples: int | None, **given: Any) -> None:
    """Print what a run would be: B, K, W, effective batch, updates per epoch, tail, warm-up, learning rate.

    Pure arithmetic: nothing is loaded, and no GPU is needed. With --dataset-file each row counts as one sample (a `text`
    row longer than the model's length becomes several when trained on).
    """
    named = {name: value for name, value in given.items() if value is not None}
    config = compose(named, (), config_file, os.environ).config
    if num_samples is not None and config.dataset_file is not None:
        raise ConfigError(
            f"num_samples={num_samples} and dataset_file={config.dataset_file} both say how much data there is; give one"
        )
    if config.dataset_file is not None:
        num_samples = count_rows(config.dataset_file)
    plan = BatchPlan(
        config.batch_size, config.gradient_accumulation_steps, processes, config.global_batch_size, num_samples
    )
    for name, value in plan_rows(plan, config):
        click.echo(f"{name:<28}{value}")


def plan_rows(plan: BatchPlan, config: Any) -> list[tuple[str, str]]:
    lr = scale_lr(config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size)
    rows = [
        ("B   micro-batch", f"{plan.micro_batch_size}"),
        ("K   accumulation steps", f"{plan.gradient_accumulation_steps}"),
        ("W   processes", f"{plan.world_size}"),
        ("B_eff  effective batch", f"{plan.global_batch_size}   ({plan.describe()})"),
    ]
    if plan.num_samples is not None:
        tail = f"{plan.tail_samples} samples in the last window" if plan.tail_samples else "none, all windows are whole"
        rows += [
            ("samples per epoch", f"{plan.num_samples}"),
            ("updates per epoch", f"{plan.updates_per_epoch}"),
            ("tail", tail),
        ]
    scaled = (
        ""
        if config.lr_scaling == "none"
        else f"   ({config.lr_scaling} from {config.lr:g} at {config.lr_base_batch_size})"
    )
    total = config.steps or (plan.updates_per_epoch * config.epochs if plan.updates_per_epoch else None)
    if total is None:
        return [
            *rows,
            ("learning rate", f"{lr:g}{scaled}"),
            ("updates", "unknown: give --steps, --num-samples or --dataset-file"),
        ]
    warmup = warmup_updates(config.warmup, total, plan.updates_per_epoch)
    lr_factor(config.scheduler, warmup, total)
    return [
        *rows,
        ("updates in all", f"{total}"),
        ("warm-up", f"{warmup} updates   (from {config.warmup})"),
        ("learning rate", f"{lr:g}{scaled}, {config.scheduler}"),
    ]
