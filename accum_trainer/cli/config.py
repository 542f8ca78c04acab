"""`accum-trainer config create`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accum_trainer.cli.options import sized_plan
from accum_trainer.cli.train import options_in, parse
from accum_trainer.errors import ConfigError

if TYPE_CHECKING:
    from accum_trainer.batch_plan import BatchPlan
    from accum_trainer.launch.files import LaunchSpec
    from accum_trainer.launch.slurm import Slurm

# Options of `train` that the launch files decide, and the option here that does.
_DECIDED = {
    "mixed_precision": "--precision",
    "amp": "--precision",
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
_SLURM = ("partition", "account", "time", "signal", "requeue")


@click.group("config")
def command() -> None:
    """Write launch configurations."""


@command.command(
    "create",
    epilog="Example: accum-trainer config create multi-gpu --engine zero2 --gpus-per-node 8 "
    "--precision bf16 --slurm "
    "--global-batch-size 256 -o launch_configs/zero2_8gpu.yaml -- --dataset-file rows.jsonl "
    "--epochs 3",
)
@click.argument("mode", metavar="single-gpu|multi-gpu|parallel-independent")
@click.option(
    "--engine",
    default="ddp",
    show_default=True,
    metavar="ddp|fsdp2|zero1|zero2|zero3",
    help="What is sharded, and by whom.",
)
@click.option("--nodes", type=int, default=1, show_default=True, metavar="N", help="Machines.")
@click.option(
    "--gpus-per-node",
    type=int,
    metavar="N",
    help="GPUs of a machine (with --cpu, processes); for parallel-independent, the number of runs.",
)
@click.option(
    "--precision", default="no", show_default=True, metavar="no|bf16|fp16", help="Mixed precision."
)
@click.option("--cpu", is_flag=True, help="Processes on the CPU instead of GPUs.")
@click.option("--cpu-offload", is_flag=True, help="Keep ZeRO's optimizer state in host memory.")
@click.option(
    "--vary",
    metavar="TEXT",
    help="parallel-independent: what differs between the runs, such as lr=1e-4,3e-4.",
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
@click.option(
    "--num-samples",
    type=int,
    metavar="N",
    help="Samples in an epoch, where no --dataset-file says it.",
)
@click.option(
    "--gpu-memory",
    metavar="GB",
    help="Memory of one GPU: say which engines fit. Needs --model after `--`.",
)
@click.option(
    "--slurm",
    is_flag=True,
    help="Also write a SLURM batch script that requeues and resumes by itself.",
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
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="The file to write.  [default: named after mode and engine]",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.argument("train", nargs=-1, type=click.UNPROCESSED, metavar="-- [TRAIN-ARGS]...")
def create(
    mode: str, output: str | None, force: bool, train: tuple[str, ...], **given: Any
) -> None:
    """Write the launch files of MODE: an accelerate YAML, with ZeRO a DeepSpeed JSON, with --slurm
    a batch script.

    Prints the batch that one update will see, and the command to run. Options of `train` after `--`
    go into that command and into the script. Files that exist are kept unless --force is given.
    """
    from accum_trainer.cli.plan import plan_rows
    from accum_trainer.launch.files import launch_files, run_command, write_files

    for name in options_in(train):
        if name in _DECIDED:
            raise ConfigError(
                f"{name} stands after --, but {_DECIDED[name]} decides it here; say it there"
            )
    batch = [text for name in _BATCH for text in _stated(name, given[name])]
    spec = _spec(mode, given, (*batch, *train))
    config = parse([*batch, *train, *_as_train(spec)]).config
    plan = sized_plan(config, spec.num_processes, given["num_samples"])
    path = Path(output) if output is not None else Path(_default_name(spec))
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"output={path} does not end in .yaml, by which accelerate's launcher goes; name it so"
        )
    memory: list[str] = []
    if "model" in options_in(train):
        from accum_trainer.cli.plan import footprint_lines

        memory = footprint_lines(config, plan, given["gpu_memory"])
    elif given["gpu_memory"] is not None:
        raise ConfigError(
            f"gpu_memory={given['gpu_memory']} is compared with what a model needs; give --model "
            "after --"
        )
    spec = _with_numbers(spec, given, plan)
    files = launch_files(spec, path)
    write_files(files, force)
    for file in files:
        click.echo(f"wrote {file}")
    for name, value in plan_rows(plan, config):
        click.echo(f"{name:<28}{value}")
    for line in memory:
        click.echo(line)
    click.echo(f"start: {run_command(spec, path)}")
    if spec.slurm is not None:
        click.echo(f"   or: sbatch {path.with_suffix('.sbatch')}")


def _stated(name: str, value: int | None) -> list[str]:
    """The option as a command line states it; K only where there is accumulation."""
    if value is None or (name == "gradient_accumulation_steps" and value == 1):
        return []
    return [f"--{name.replace('_', '-')}", str(value)]


def _spec(mode: str, given: dict[str, Any], train: tuple[str, ...]) -> LaunchSpec:
    from accum_trainer.launch.files import ENGINES, MODES, PRECISIONS, LaunchSpec, combinations

    for name, value, known in (
        ("mode", mode, MODES),
        ("engine", given["engine"], ENGINES),
        ("precision", given["precision"], PRECISIONS),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value} is not known; give one of {', '.join(known)}")
    for name in ("nodes", "gpus_per_node"):
        if given[name] is not None and given[name] < 1:
            raise ConfigError(f"{name}={given[name]} is below 1; give a whole number of at least 1")
    count = given["gpus_per_node"]
    if given["vary"] is not None:
        if mode != "parallel-independent":
            raise ConfigError(
                f"vary={given['vary']} is for independent runs, but the mode is {mode}; use "
                "parallel-independent"
            )
        count = count or len(combinations(given["vary"]))
    if count is None and mode != "single-gpu":
        what = (
            "independent runs there shall be"
            if mode == "parallel-independent"
            else "GPUs a machine has"
        )
        raise ConfigError(f"{mode} needs --gpus-per-node: how many {what}")
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
    from accum_trainer.launch.slurm import Slurm

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
    """What the launch files will make `train` do, as its options, so that memory and learning rate
    are reckoned with it."""
    options = ["--mixed-precision", spec.precision]
    if spec.zero_stage is not None:
        options += ["--zero-stage", spec.engine, *(["--cpu-offload"] if spec.cpu_offload else [])]
    return [*options, *(["--cpu"] if spec.cpu else [])]


def _with_numbers(spec: LaunchSpec, given: dict[str, Any], plan: BatchPlan) -> LaunchSpec:
    """B and K as numbers where both were asked for: then DeepSpeed's file states them, and any
    other K is refused."""
    from dataclasses import replace

    if given["batch_size"] is None or (
        given["gradient_accumulation_steps"] is None and given["global_batch_size"] is None
    ):
        return spec
    return replace(
        spec,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )


def _default_name(spec: LaunchSpec) -> str:
    if spec.mode == "single-gpu":
        return "single_gpu.yaml"
    what = "parallel_independent" if spec.mode == "parallel-independent" else spec.engine
    unit = "proc" if spec.cpu else "gpu"
    nodes = f"{spec.nodes}node_" if spec.nodes > 1 else ""
    return f"{what}_{nodes}{spec.gpus_per_node}{unit}.yaml"
