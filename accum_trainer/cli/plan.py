"""`accum-trainer plan`."""

from __future__ import annotations

import click

from accum_trainer.cli.options import (
    GIGABYTES,
    OneShownOption,
    SectionedCommand,
    composed_options,
    is_on_command_line,
    num_samples_option,
)
from accum_trainer.config import Composed, TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.launch.spec import combinations
from accum_trainer.plan.batch_report import batch_report, line, sized_plan

# Options of `train` that its plan depends on. The others are accepted, so that a whole line of
# `train` can be planned, and change nothing.
_USED = (
    *("batch_size", "gradient_accumulation_steps", "global_batch_size", "grad_sync"),
    "weight_sync",
    "max_tokens_per_micro_batch",
    *("accumulation_dtype", "steps", "epochs", "dataset_file", "lr", "lr_scaling"),
    *("lr_base_batch_size", "scheduler", "warmup", "model", "max_seq_len", "mixed_precision"),
    *("revision", "trust_remote_code"),
    *("amp", "gradient_checkpointing", "activation_offload", "attention"),
    *("use_peft", "lora_r", "lora_dropout"),
    *("lora_target_modules", "lora_modules_to_save", "engine", "zero_stage"),
    *("cpu_offload", "shard_size", "cpu", "parallel_independent", "cuda_ids", "vary", "shard"),
)


@click.command(
    "plan",
    cls=SectionedCommand,
    epilog="Example: accum-trainer plan --global-batch-size 64 --batch-size 4 --processes 2 "
    "--num-samples 7473 --epochs 3 --warmup 5%",
)
@click.option(
    "--processes",
    "--gpus-per-node",
    "processes",
    cls=OneShownOption,
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
@composed_options(_USED)
def command(
    composed: Composed, processes: int, num_samples: int | None, gpu_memory: float | None
) -> None:
    """Print the plan of a run: B, K, W, effective batch, updates per epoch, tail, warm-up, learning
    rate.

    Pure arithmetic: nothing is loaded, and no GPU is needed. With --dataset-file each row counts as
    one sample (a `text` row longer than the model's length becomes several in training).

    Takes a whole line of `train`: options that do not change the plan are accepted. Of
    --parallel-independent, the plan of each run is printed.

    With --model, also what each engine needs on a GPU and sends between GPUs, computed from the
    model's configuration: no weights are read and nothing is allocated.
    """
    _check_processes(composed.config, processes)
    lines = []
    for title, config in _runs(composed.config):
        lines += [*title, *_lines(config, processes, num_samples, gpu_memory)]
    click.echo("\n".join(lines))


def _lines(
    config: TrainConfig, processes: int, num_samples: int | None, gpu_memory: float | None
) -> list[str]:
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
    return lines


def _check_processes(config: TrainConfig, processes: int) -> None:
    """Raise a ConfigError if `train` would not run this engine on this number of processes."""
    single = "engine=single" if config.engine == "single" else ""
    if config.parallel_independent:
        single = "each of the parallel_independent runs"
    if processes > 1 and single:
        raise ConfigError(
            f"{single} is one process, but processes={processes}; leave --processes out"
        )
    if processes == 1 and config.engine in ("ddp", "fsdp2"):
        raise ConfigError(
            f"engine={config.engine} shares the gradient between processes, but processes=1; say "
            "how many there are with --processes"
        )
    if config.shard_size is not None:
        from accum_trainer.engine.mesh import shard_mesh

        shard_mesh(0, processes, config.shard_size)


def _runs(config: TrainConfig) -> list[tuple[list[str], TrainConfig]]:
    """The runs to plan, each with lines that name it: one, without a name, unless they are
    independent. Those on shares of the samples differ by one sample at most: the first is
    planned."""
    if not config.parallel_independent:
        return [([], config)]
    alone = config.alone()
    if config.vary is not None:
        return [
            ([line(f"run {n}", "  ".join(settings))], alone.varied(settings))
            for n, settings in enumerate(combinations(config.vary))
        ]
    if config.cuda_ids is None:
        raise ConfigError(
            "parallel_independent without cuda_ids trains on all GPUs of the machine, which a plan "
            "does not know; give cuda_ids, such as 0,1"
        )
    count = len(config.cuda_ids.split(","))
    return [([line("runs", f"{count}, each on its own share")], alone.varied([f"shard=0/{count}"]))]
