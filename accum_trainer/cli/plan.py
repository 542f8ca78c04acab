"""`accum-trainer plan`."""

from __future__ import annotations

import click

from accum_trainer.cli.options import (
    GIGABYTES,
    SectionedCommand,
    composed_options,
    is_on_command_line,
    num_samples_option,
)
from accum_trainer.config import Composed, TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.plan.batch_report import batch_report, sized_plan

_USED = (
    *("batch_size", "gradient_accumulation_steps", "global_batch_size", "grad_sync"),
    "weight_sync",
    *("accumulation_dtype", "steps", "epochs", "dataset_file", "lr", "lr_scaling"),
    *("lr_base_batch_size", "scheduler", "warmup", "model", "max_seq_len", "mixed_precision"),
    *("revision", "trust_remote_code"),
    *("amp", "gradient_checkpointing", "attention", "use_peft", "lora_r", "lora_dropout"),
    *("lora_target_modules", "lora_modules_to_save", "zero_stage", "cpu_offload", "cpu"),
)


@click.command(
    "plan",
    cls=SectionedCommand,
    epilog="Example: accum-trainer plan --global-batch-size 64 --batch-size 4 --processes 2 "
    "--num-samples 7473 --epochs 3 --warmup 5%",
)
@click.option(
    "--processes",
    default=1,
    show_default=True,
    metavar="W",
    help="Processes that share the gradient.",
)
@num_samples_option
@click.option(
    "--gpu-memory",
    type=GIGABYTES,
    metavar="GB",
    help="Memory of one GPU, 10^9 bytes: say which engines fit. Needs --model.",
)
@composed_options(_USED, has_set=False)
def command(
    composed: Composed, processes: int, num_samples: int | None, gpu_memory: float | None
) -> None:
    """Print the plan of a run: B, K, W, effective batch, updates per epoch, tail, warm-up, learning
    rate.

    Pure arithmetic: nothing is loaded, and no GPU is needed. With --dataset-file each row counts as
    one sample (a `text` row longer than the model's length becomes several in training).

    With --model, also what each engine needs on a GPU and sends between GPUs, computed from the
    model's configuration: no weights are read and nothing is allocated.
    """
    config = composed.config
    plan = sized_plan(config, processes, num_samples)
    lines = batch_report(plan, config)
    if is_on_command_line("model") or (
        gpu_memory is not None and config.model != TrainConfig.model
    ):
        from accum_trainer.plan.memory_report import memory_report

        lines += memory_report(config, plan, gpu_memory)
    elif gpu_memory is not None:
        raise ConfigError(
            f"gpu_memory={gpu_memory:g} is compared with what a model needs; give --model too"
        )
    click.echo("\n".join(lines))
