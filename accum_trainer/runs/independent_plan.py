"""Plan independent runs: from one configuration to the runs, and the devices to run them on.

Refuses settings that cannot differ, devices that do not exist, and a folder with other runs. Starts
nothing and writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from accum_trainer.config import TrainConfig
from accum_trainer.engine.lost_processes import launched_processes
from accum_trainer.errors import ConfigError
from accum_trainer.runs.independent_files import INDEPENDENT, listed_runs
from accum_trainer.runs.independent_run import IndependentRun
from accum_trainer.runs.independent_settings import devices_of, settings_of
from accum_trainer.train import run_folder as files


def plan_runs(config: TrainConfig, folder: Path) -> tuple[list[IndependentRun], list[str], bool]:
    """The runs that `config` asks for, the devices (or slots) to run them on, and whether those are
    GPUs.

    Raises:
        ConfigError: a device does not exist, a setting cannot vary, or the folder holds something
            else.
    """
    _check_single_process()
    for name in ("log_file", "resume"):
        value = getattr(config, name)
        if value is not None and not (name == "resume" and value in ("auto", "never")):
            raise ConfigError(
                f"{name}={value} is one place, and parallel_independent has several runs; leave it "
                "out"
            )
    on_gpu = torch.cuda.is_available() and not config.cpu
    devices = devices_of(config.cuda_ids, torch.cuda.device_count() if on_gpu else None)
    base = replace(config.alone(), resume="auto")
    runs = []
    for i, settings in enumerate(settings_of(config.vary, len(devices))):
        name = f"part-{i}"
        options = [f"{key}={value}" for key, value in settings.items()]
        varied = base.varied([*options, f"output_dir={folder / name}"])
        log = folder / files.LOGS / f"{name}.log"
        runs.append(IndependentRun(name, settings, varied, folder / name, log))
    _check_folder(folder, runs, config.resume)
    return runs, devices, on_gpu


def _check_single_process() -> None:
    world_size = launched_processes()
    if world_size > 1:
        raise ConfigError(
            "parallel_independent starts single processes, but runs as one of "
            f"{world_size} of a launcher; start it with `accum-trainer train`"
        )


def _check_folder(folder: Path, runs: list[IndependentRun], resume: str) -> None:
    manifest = folder / INDEPENDENT
    if not manifest.is_file():
        files.check_output_dir(folder, resume)
        if (folder / files.CONFIG).is_file():
            raise ConfigError(
                f"output_dir={folder} holds a single run, not a set of runs; choose another folder"
            )
        return
    if resume == "never":
        raise ConfigError(
            f"output_dir={folder} already holds runs and resume=never; choose another folder, or "
            "resume=auto"
        )
    held = dict(listed_runs(folder, "choose another output_dir"))
    wanted = {run.name: run.settings for run in runs}
    if held != wanted:
        raise ConfigError(
            f"output_dir={folder} holds {_summary(held)}, and {_summary(wanted)} are asked for "
            "now; give the same devices and vary as before, or another output_dir"
        )


def _summary(runs: dict[str, dict[str, str]]) -> str:
    shown = [
        " ".join(f"{key}={value}" for key, value in settings.items()) for settings in runs.values()
    ]
    return f"{len(runs)} runs ({'; '.join(shown[:3])}{'; ...' if len(shown) > 3 else ''})"
