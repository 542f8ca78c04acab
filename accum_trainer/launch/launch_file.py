"""Read a launch configuration and refuse what accelerate's launcher would start differently.

accelerate answers an unknown key with a traceback. It silently starts one process for MULTI_CPU,
and more processes than there are devices. Here each is one message, before anything is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import __version__ as accelerate_version
from accelerate.commands.config.config_args import load_config_from_file

from accum_trainer.config.option import shown
from accum_trainer.config.sources import read_yaml
from accum_trainer.errors import ConfigError, first_line
from accum_trainer.launch.spec import PRECISIONS

_KNOWN = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")


@dataclass(frozen=True)
class LaunchFile:
    """A launch configuration that accelerate can start.

    Attributes:
        num_machines, num_processes: nodes, and processes on all of them together.
        deepspeed_file: the DeepSpeed configuration it names, as a path that exists; or None.
        main_process_port: the port it names, or None.
    """

    path: Path
    num_machines: int
    num_processes: int
    deepspeed_file: Path | None
    main_process_port: int | None

    @property
    def processes_here(self) -> int:
        return self.num_processes // self.num_machines


def read_launch_file(path: Path, cpu: bool) -> LaunchFile:
    """Read and check the accelerate configuration at `path`; `cpu`: the training stays on the CPU.

    Raises:
        ConfigError: accelerate cannot read the file, or would start something else.
    """
    read_yaml(path, "launch configuration")  # refuses what is not YAML, with the line
    try:
        config = load_config_from_file(str(path))
    except Exception as error:  # of any type: the first statement that a value does not suit
        raise ConfigError(
            f"accelerate {accelerate_version} cannot read {path}: {first_line(error)}; "
            "write it again with `accum-trainer config create`"
        ) from None
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind == "MULTI_CPU" or (config.use_cpu and kind != "NO"):
        raise ConfigError(
            f"{path}: with distributed_type={kind} and use_cpu={config.use_cpu} accelerate starts "
            "one process only; write distributed_type: MULTI_GPU and use_cpu: false, which without "
            "GPUs starts them all over gloo"
        )
    if kind not in _KNOWN:
        raise ConfigError(
            f"{path}: distributed_type={kind} has no engine here; use one of {', '.join(_KNOWN)} "
            "(`accum-trainer config create` writes them)"
        )
    _check_values(path, config)
    machines, processes, port = (
        _whole_number(path, config, name)
        for name in ("num_machines", "num_processes", "main_process_port")
    )
    machines, processes = machines or 1, processes or 1
    if processes % machines:
        raise ConfigError(
            f"{path}: num_processes={processes} do not spread evenly over num_machines={machines}; "
            f"num_processes counts all nodes: use {machines} or a multiple of it"
        )
    found = LaunchFile(
        path,
        machines,
        processes,
        _deepspeed_file(path, config.deepspeed_config or {}),
        port,
    )
    _check_devices(found, cpu)
    return found


def _check_values(path: Path, config: Any) -> None:
    """Raise a ConfigError for a value on which accelerate's launcher ends in a traceback."""
    for name in ("deepspeed_config", "fsdp_config", "dynamo_config"):
        section = getattr(config, name)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(
                f"{path}: {name}={shown(section)} is no section of `option: value` lines; write it "
                "again with `accum-trainer config create`"
            )
    precision = config.mixed_precision
    if precision not in (None, *PRECISIONS, False):  # YAML reads `no` as false
        raise ConfigError(
            f"{path}: mixed_precision={shown(precision)} is not known; give one of "
            f"{', '.join(PRECISIONS)}"
        )


def _whole_number(path: Path, config: Any, name: str) -> int | None:
    """A number of the file; None if it has none."""
    value = getattr(config, name)
    if value is None:
        return None
    text = shown(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{path}: {name}={text} is no whole number")
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(f"{path}: {name}={text} is no whole number") from None
    if number < 1:
        raise ConfigError(f"{path}: {name}={text} is below 1")
    return number


def _deepspeed_file(path: Path, section: dict[str, Any]) -> Path | None:
    named = section.get("deepspeed_config_file")
    if named in (None, "none"):
        return None
    for candidate in (Path(str(named)), path.parent / Path(str(named)).name):
        if candidate.is_file():
            return candidate.absolute()
    raise ConfigError(
        f"{path}: deepspeed_config_file={named} does not exist, here or beside it; write both "
        "again, or correct the path"
    )


def _check_devices(file: LaunchFile, cpu: bool) -> None:
    here, gpus = file.processes_here, torch.cuda.device_count()
    # num_processes counts those of all nodes.
    over = f" (over {file.num_machines} nodes)" if file.num_machines > 1 else ""
    if gpus and not cpu:
        if here > gpus:
            raise ConfigError(
                f"{file.path} starts {here} processes on this machine, which has {gpus} GPUs; "
                f"set num_processes to {gpus * file.num_machines}{over}, and keep the effective "
                "batch with --global-batch-size"
            )
        return
    cores = os.cpu_count() or 1
    if here > cores:
        raise ConfigError(
            f"{file.path} starts {here} processes on this machine, which has "
            f"{'no GPU and ' if not gpus else ''}{cores} CPU cores; set num_processes to "
            f"{cores * file.num_machines} or less{over}"
        )
