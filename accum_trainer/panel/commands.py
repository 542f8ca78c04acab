"""The command line that a form stands for, as one would type it.

An option is named only if it differs from what holds without it, so K only above 1. Several
processes, FSDP2 and ZeRO need a launch file, so a first command writes it. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accum_trainer.config import TrainConfig
from accum_trainer.launch.quoting import words
from accum_trainer.launch.spec import LaunchSpec

PROGRAM, TORCHRUN = "accum-trainer", "torchrun"
# Beside the runs: launch files that the panel writes.
LAUNCH_FILES = "launch-files"
# Options of `train` that a launch file decides.
_IN_LAUNCH_FILE = {"mixed_precision", "engine", "cpu_offload"}
# Options of several runs, of which one is proven.
_OF_SEVERAL_RUNS = {"parallel_independent", "cuda_ids", "vary", "max_restarts"}


@dataclass(frozen=True)
class Command:
    """How to start a run by hand.

    Attributes:
        words: of the command that trains, the program's name first.
        launch: what its launch file is made of, and where it is; None without one.
        yaml: the same options of `train` as a file for `--config`.
    """

    words: list[str]
    launch: tuple[LaunchSpec, Path] | None
    yaml: str

    @property
    def lines(self) -> list[str]:
        """One or two commands of bash."""
        first = [] if self.launch is None else [words(_create(*self.launch))]
        return [*first, words(self.words)]


def command_for(
    given: Mapping[str, Any],
    config: TrainConfig,
    without: TrainConfig,
    launch: LaunchSpec | None,
    folder: Path,
) -> Command:
    """The command that trains as `config` says, in the run directory `folder`.

    Args:
        given: names of the options that were typed.
        config: what they compose to.
        without: the configuration that holds if none of them is named.
        launch: the processes; None for plain `train`.
    """
    left_out = set() if launch is None else _IN_LAUNCH_FILE
    stated = _stated(given, config, without, left_out)
    arguments = [*_options(stated), "--output-dir", str(folder)]
    # A file may not allow a model's code; the command line does.
    text = yaml.safe_dump(
        {name: value for name, value in stated.items() if name != "trust_remote_code"},
        sort_keys=False,
        allow_unicode=True,
    )
    shown = text if stated else "# Every option is at its default.\n"
    if launch is None:
        return Command([PROGRAM, "train", *arguments], None, shown)
    file = folder.parent / LAUNCH_FILES / _file_name(launch)
    return Command([PROGRAM, "launch", str(file), "--", *arguments], (launch, file), shown)


def verify_words(
    given: Mapping[str, Any],
    config: TrainConfig,
    without: TrainConfig,
    launch: LaunchSpec | None,
    report: Path,
) -> list[str]:
    """The command that proves an update of the same training; of independent runs, of one.

    Args:
        given, config, without, launch: as for `command_for`. torchrun needs no launch file: the
            engine is an option.
        report: the JSON file that it writes.
    """
    options = [*_options(_stated(given, config, without, _OF_SEVERAL_RUNS)), "--json", str(report)]
    if launch is None:
        return [PROGRAM, "verify", *options]
    processes = ["--standalone", "--nproc_per_node", str(launch.num_processes)]
    return [TORCHRUN, *processes, "-m", "accum_trainer.verify", *options]


def _stated(
    given: Mapping[str, Any], config: TrainConfig, without: TrainConfig, left_out: set[str]
) -> dict[str, Any]:
    """The options that make a difference, by name."""
    return {
        name: getattr(config, name)
        for name in given
        if name not in left_out and getattr(config, name) != getattr(without, name)
    }


def _options(stated: Mapping[str, Any]) -> list[str]:
    return [word for name, value in stated.items() for word in _option(name, value)]


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    # A value that begins with a dash would be read as an option.
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def _create(spec: LaunchSpec, file: Path) -> list[str]:
    """The command that writes the launch file."""
    options = [] if spec.engine == "ddp" else ["--engine", spec.engine]
    if spec.mode == "multi-gpu":
        options += ["--gpus-per-node", str(spec.gpus_per_node)]
    if spec.precision != "no":
        options += ["--precision", spec.precision]
    options += [
        f"--{flag}" for flag, on in (("cpu", spec.cpu), ("cpu-offload", spec.cpu_offload)) if on
    ]
    return [PROGRAM, "config", "create", spec.mode, *options, "--force", "-o", str(file)]


def _file_name(spec: LaunchSpec) -> str:
    parts = [spec.engine, f"{spec.gpus_per_node}{'proc' if spec.cpu else 'gpu'}"]
    parts += [spec.precision] if spec.precision != "no" else []
    parts += ["offload"] if spec.cpu_offload else []
    return "_".join(parts) + ".yaml"


def merge_words(folder: Path, eval_file: str, force: bool, allow_unfinished: bool) -> list[str]:
    """The command that merges the independent runs of a folder.

    Args:
        eval_file: rows to evaluate on; "" for the runs' own.
        force: replace an earlier merge.
        allow_unfinished: merge runs that have not finished as they are.
    """
    rows = _option("eval_file", eval_file) if eval_file else []
    flags = (("--allow-unfinished", allow_unfinished), ("--force", force))
    return [PROGRAM, "merge", str(folder), *rows, *(flag for flag, is_given in flags if is_given)]


def compare_words(folders: Sequence[Path]) -> list[str]:
    """The command that prints the same comparison, and draws its picture."""
    return [PROGRAM, "compare", *map(str, folders)]
