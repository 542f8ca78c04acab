"""`accum-trainer config create`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.cli.completion import train_arguments
from accum_trainer.cli.file_completion import path_option
from accum_trainer.cli.options import (
    GIGABYTES,
    BeforeTrainArguments,
    OneShownOption,
    num_samples_option,
)
from accum_trainer.cli.train import options_in, parse
from accum_trainer.config.engine import ENGINES
from accum_trainer.errors import ConfigError
from accum_trainer.launch.files import launch_files, run_command, write_files
from accum_trainer.launch.slurm import Slurm
from accum_trainer.launch.spec import MODES, PRECISIONS, LaunchSpec, combinations
from accum_trainer.plan.batch_report import batch_report, sized_plan

# Options of `train` that the launch files decide, and the option of this command for each.
_DECIDED = {
    "mixed_precision": "--precision",
    "amp": "--precision",
    "engine": "--engine",
    "zero_stage": "--engine",
    "cpu_offload": "--cpu-offload",
    "cpu": "--cpu",
    "batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "global_batch_size": "--global-batch-size",
    "parallel_independent": "the mode",
    "cuda_ids": "--gpus-per-node",
    "vary": "--vary",
    "shard": "the mode",
}
_BATCH = ("batch_size", "gradient_accumulation_steps", "global_batch_size")
_AT_LEAST_1 = click.IntRange(min=1)
_SLURM = ("partition", "account", "time", "signal", "requeue")


@click.group("config")
def command() -> None:
    """Write launch configurations."""


@command.command(
    "create",
    cls=BeforeTrainArguments,
    epilog="Example: accum-trainer config create multi-gpu --engine zero2 --gpus-per-node 8 "
    "--precision bf16 --slurm "
    "--global-batch-size 256 -o launch_configs/zero2_8gpu.yaml -- --dataset-file rows.jsonl "
    "--epochs 3",
)
@click.argument("mode", type=click.Choice(MODES), metavar="MODE")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="ddp",
    show_default="ddp; of one process single",
    metavar="|".join(ENGINES),
    help="Which library shards, and which state.",
)
@click.option(
    "--nodes", type=_AT_LEAST_1, default=1, show_default=True, metavar="N", help="Machines."
)
@click.option(
    "--gpus-per-node",
    "--processes",
    "gpus_per_node",
    cls=OneShownOption,
    type=_AT_LEAST_1,
    metavar="N",
    help="GPUs of a machine (with --cpu, processes); for parallel-independent, the number of runs.",
)
@click.option(
    "--precision",
    "--mixed-precision",
    "precision",
    cls=OneShownOption,
    type=click.Choice(PRECISIONS),
    default="no",
    show_default=True,
    metavar="|".join(PRECISIONS),
    help="Mixed precision.",
)
@click.option("--cpu", is_flag=True, help="Processes on the CPU instead of GPUs.")
@click.option(
    "--cpu-offload",
    is_flag=True,
    help="Keep ZeRO's optimizer state, or FSDP2's shards, in host memory.",
)
@click.option(
    "--vary",
    metavar="TEXT",
    help="parallel-independent: settings that differ between the runs, such as lr=1e-4,3e-4.",
)
@click.option(
    "--batch-size", type=int, metavar="N", help="B, samples in one forward/backward on one process."
)
@click.option(
    "--gradient-accumulation-steps",
    type=int,
    metavar="N",
    help="K, micro-batches per update on one process.",
)
@click.option(
    "--global-batch-size", type=int, metavar="N", help="B_eff, samples per update; K follows."
)
@num_samples_option
@click.option(
    "--gpu-memory",
    type=GIGABYTES,
    metavar="GB",
    help="Memory of one GPU: say which engines fit. Needs --model after `--`.",
)
@click.option(
    "--slurm",
    is_flag=True,
    help="Also write a SLURM batch script that requeues and resumes automatically.",
)
@click.option("--partition", metavar="NAME", help="SLURM partition.")
@click.option("--account", metavar="NAME", help="SLURM account.")
@click.option(
    "--time", metavar="HH:MM:SS", help="SLURM time limit of one start.  [default: 24:00:00]"
)
@click.option(
    "--signal",
    metavar="USR1@SECONDS",
    help="SLURM: when to save before the limit.  [default: USR1@180]",
)
@click.option(
    "--requeue/--no-requeue",
    default=None,
    help="SLURM: go back into the queue when stopped.  [default: requeue]",
)
@path_option(
    "-o",
    "--output",
    metavar="FILE",
    help="The file to write.  [default: named after mode and engine]",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@train_arguments
def create(
    mode: str, output: str | None, force: bool, train: tuple[str, ...], **given: Any
) -> None:
    """Write the launch files of MODE: an accelerate YAML, with ZeRO a DeepSpeed JSON, with --slurm
    a batch script.

    MODE is single-gpu, multi-gpu or parallel-independent. Prints the batch that one update will
    see, and the command to run. Options of `train` after `--` go into that command and into the
    script. Existing files are kept unless --force is given.
    """
    for name in options_in(train):
        if name in _DECIDED:
            raise ConfigError(
                f"{name} stands after --, but {_DECIDED[name]} decides it here; give it there"
            )
    batch = [text for name in _BATCH for text in _stated(name, given[name])]
    spec = _spec(mode, given, (*batch, *train))
    config = parse([*batch, *train, *_as_train(spec)]).config
    plan = sized_plan(config, spec.num_processes, given["num_samples"])
    path = Path(output) if output is not None else Path(_default_name(spec))
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"output={path} does not end in .yaml, which accelerate's launcher requires; rename it"
        )
    report = batch_report(plan, config)
    if "model" in options_in(train):
        from accum_trainer.plan.memory_report import memory_report

        report += memory_report(config, plan, given["gpu_memory"])
    elif given["gpu_memory"] is not None:
        raise ConfigError(
            f"gpu_memory={given['gpu_memory']:g} is compared with what a model needs; give --model "
            "after --"
        )
    spec = _with_numbers(spec, given, plan)
    files = launch_files(spec, path)
    write_files(files, force)
    for file in files:
        click.echo(f"wrote {file}")
    click.echo("\n".join(report))
    click.echo(f"start: {run_command(spec, path)}")
    if spec.slurm is not None:
        click.echo(f"   or: sbatch {path.with_suffix('.sbatch')}")


def _stated(name: str, value: int | None) -> list[str]:
    """The option as command-line words; none for K = 1, the default."""
    if value is None or (name == "gradient_accumulation_steps" and value == 1):
        return []
    return [f"--{name.replace('_', '-')}", str(value)]


def _spec(mode: str, given: dict[str, Any], train: tuple[str, ...]) -> LaunchSpec:
    count = given["gpus_per_node"]
    if given["vary"] is not None:
        if mode != "parallel-independent":
            raise ConfigError(
                f"vary={given['vary']} is for independent runs, but the mode is {mode}; use "
                "parallel-independent"
            )
        count = count or len(combinations(given["vary"]))
    if count is None and mode != "single-gpu":
        counted = "independent runs to start"
        if mode == "multi-gpu":
            counted = "GPUs a machine has"
        raise ConfigError(f"{mode} needs --gpus-per-node: how many {counted}")
    return LaunchSpec(
        mode,
        engine=given["engine"],
        nodes=given["nodes"],
        gpus_per_node=count or 1,
        precision=given["precision"],
        cpu=given["cpu"],
        cpu_offload=given["cpu_offload"],
        train=train,
        vary=given["vary"],
        slurm=_slurm(given),
    )


def _slurm(given: dict[str, Any]) -> Slurm | None:
    named = {name: given[name] for name in _SLURM if given[name] is not None}
    if given["slurm"]:
        return Slurm(**named)
    if named:
        name, value = next(iter(named.items()))
        raise ConfigError(
            f"{name}={value} is for a batch script, which --slurm writes; give --slurm too, or "
            "leave it out"
        )
    return None


def _as_train(spec: LaunchSpec) -> list[str]:
    """The settings of the launch files as options of `train`, for the memory and learning-rate
    reports."""
    options = ["--mixed-precision", spec.precision]
    if spec.num_processes > 1 or spec.zero_stage is not None:
        options += ["--engine", spec.engine, *(["--cpu-offload"] if spec.cpu_offload else [])]
    return [*options, *(["--cpu"] if spec.cpu else [])]


def _with_numbers(spec: LaunchSpec, given: dict[str, Any], plan: BatchPlan) -> LaunchSpec:
    """Put B and K into `spec` if both are given: DeepSpeed's file then states them, and any other
    K is refused."""
    if given["batch_size"] is None or (
        given["gradient_accumulation_steps"] is None and given["global_batch_size"] is None
    ):
        return spec
    return dataclasses.replace(
        spec,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )


def _default_name(spec: LaunchSpec) -> str:
    if spec.mode == "single-gpu":
        return "single_gpu.yaml"
    kind = "parallel_independent" if spec.mode == "parallel-independent" else spec.engine
    unit = "proc" if spec.cpu else "gpu"
    nodes = f"{spec.nodes}node_" if spec.nodes > 1 else ""
    return f"{kind}_{nodes}{spec.gpus_per_node}{unit}.yaml"
