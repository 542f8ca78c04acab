"""From a form to the effective batch, the plan, warnings and the command, or to an error.

Everything here is arithmetic and the checks of `TrainConfig` and `LaunchSpec`; nothing is loaded,
and torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accum_trainer.batch_plan import (
    BatchPlan,
    positive_int,
    samples_of_shard,
    scale_lr,
    warmup_updates,
)
from accum_trainer.config import TrainConfig, compose
from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.spec import LaunchSpec
from accum_trainer.panel.commands import LAUNCH_FILES, Command, command_for, verify_words
from accum_trainer.panel.form import ENGINE, FIELDS, LENGTH, NESTED, OWN, PROCESSES, RUN_NAME, UNIT
from accum_trainer.panel.proof import PROOF
from accum_trainer.panel.row_counts import RowCounts
from accum_trainer.runs.independent_files import INDEPENDENT
from accum_trainer.runs.independent_settings import devices_of, settings_of
from accum_trainer.train.run_folder import check_output_dir, holds_run

# Fields by what messages call them, if that is not the field's own name.
_OTHER_NAMES = {
    "processes": PROCESSES,
    "engine": ENGINE,
    "run_name": RUN_NAME,
    "steps": LENGTH,
    "epochs": LENGTH,
    "world_size": PROCESSES,
    "gpus_per_node": PROCESSES,
    "precision": "mixed_precision",
    "output_dir": RUN_NAME,
    "micro_batch_size": "batch_size",
    "data file": "dataset_file",
    "parallel_independent": "cuda_ids",  # which it needs on a CPU
}


@dataclass(frozen=True)
class Preview:
    """The meaning of a form's values.

    Attributes:
        effective: B x K x W, if all three are numbers; it does not wait for the rest to be right.
        sizes: B, K and W then.
        error, at: what is wrong, in one message, and the field that it is about, or "".
        figures: name and value of each line of the plan.
        warnings: what is worth a thought, though it would run.
        folder: the run directory; it holds a run already if `continues`.
        command: None if something is wrong.
        proof: the words of the command that proves an update of it; None if something is wrong.
    """

    effective: int | None
    sizes: tuple[int, int, int] | None
    error: str = ""
    at: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = None
    continues: bool = False
    command: Command | None = None
    proof: list[str] | None = None
    config: TrainConfig | None = None


def preview(values: Mapping[str, str | bool], runs: Path, rows: RowCounts) -> Preview:
    """Read the values of a form.

    Args:
        runs: the folder of run directories.
        rows: counts the rows of data files.
    """
    sizes = _sizes(values)
    effective = sizes[0] * sizes[1] * sizes[2] if sizes else None
    try:
        config, launch, plan, folder, command, proof, num_rows = _composed(values, runs, rows)
        figures = [*_of_runs(config, num_rows), *_figures(plan, config)]
    except AccumTrainerError as error:
        return Preview(effective, sizes, str(error), _field_of(str(error)))
    continues = holds_run(folder) or (folder / INDEPENDENT).is_file()
    warnings = _warnings(plan, config, launch)
    if continues:
        held = "runs" if config.parallel_independent else "a run"
        warnings.insert(0, f"{folder} holds {held} already: starting goes on with what is there.")
    return Preview(
        effective,
        sizes,
        figures=figures,
        warnings=warnings,
        folder=folder,
        continues=continues,
        command=command,
        proof=proof,
        config=config,
    )


def _sizes(values: Mapping[str, str | bool]) -> tuple[int, int, int] | None:
    try:
        batch, steps, processes = (
            positive_int(name, int(str(values[name])))
            for name in ("batch_size", "gradient_accumulation_steps", PROCESSES)
        )
    except (ConfigError, ValueError):
        return None
    return batch, steps, processes


def _composed(
    values: Mapping[str, str | bool], runs: Path, rows: RowCounts
) -> tuple[TrainConfig, LaunchSpec | None, BatchPlan, Path, Command, list[str], int | None]:
    given = _given(values)
    processes = _whole_number("processes", str(values[PROCESSES]))
    engine = str(values[ENGINE])
    if engine != "ddp":  # of one process it is single, which is the default
        given["engine"] = engine
    config = compose(given, (), None, os.environ).config
    if isinstance(config.batch_size, str):
        raise ConfigError(
            "batch_size=auto is found on the device when training starts, so the panel cannot show "
            "the batch; give a number, or use the command line"
        )
    launch = _launch(engine, processes, config)
    num_rows = None if config.dataset is not None else rows.of(config.dataset_file)
    plan = BatchPlan(
        *(config.batch_size, config.gradient_accumulation_steps, processes),
        *(config.global_batch_size, _rows_of_one(config, num_rows)),
    )
    folder = runs / _name(str(values[RUN_NAME]).strip(), config, plan, runs)
    if not (folder / INDEPENDENT).is_file():
        check_output_dir(folder, config.resume)
    elif not config.parallel_independent:
        raise ConfigError(
            f"output_dir={folder} holds independent runs, not a single run; choose another name"
        )
    without = compose({}, (), None, os.environ).config
    return (
        config,
        launch,
        plan,
        folder,
        command_for(given, config, without, launch, folder),
        verify_words(given, config, without, launch, runs / PROOF),
        num_rows,
    )


def _given(values: Mapping[str, str | bool]) -> dict[str, Any]:
    """The options that were typed, as `compose` takes them."""
    given: dict[str, Any] = {}
    for name, known in FIELDS.items():
        value = values[name]
        text = value.strip() if isinstance(value, str) else value
        is_idle = any(name in fields and not values[switch] for switch, fields in NESTED.items())
        if (
            name not in OWN
            and text != ""
            and not is_idle
            and (known.kind != "switch" or text != known.default)
        ):
            given[name] = text
    length = str(values[LENGTH]).strip()
    if length:
        given[str(values[UNIT])] = length
    return given


def _whole_number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} is not an integer; give a whole number of at least 1"
        ) from None
    return positive_int(name, number)


def _launch(engine: str, processes: int, config: TrainConfig) -> LaunchSpec | None:
    """The processes to launch; None where plain `train` is one process.

    Raises:
        ConfigError: the combination cannot run.
    """
    if config.parallel_independent and processes > 1:
        raise ConfigError(
            f"processes={processes} share a gradient, and each of the parallel_independent runs is "
            "one process; give 1"
        )
    if processes == 1 and (engine == "ddp" or config.parallel_independent):
        return None
    return LaunchSpec(
        "single-gpu" if processes == 1 else "multi-gpu",
        engine=engine,
        gpus_per_node=processes,
        precision=config.mixed_precision or "no",
        cpu=config.cpu,
        cpu_offload=config.cpu_offload,
    )


def _name(typed: str, config: TrainConfig, plan: BatchPlan, runs: Path) -> str:
    if typed:
        if not re.fullmatch(r"\w[\w.+=-]*", typed) or typed == LAUNCH_FILES or len(typed) > 100:
            raise ConfigError(
                f"run_name={typed[:100]} is no name of a run; give letters, digits and . _ - only"
            )
        return typed
    model = re.sub(r"[^\w.-]+", "-", Path(config.model).name).strip("-.") or "model"
    name, number = f"{model[:60]}-{plan.global_batch_size}", 1
    while (runs / (found := name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return found


def _settings(config: TrainConfig) -> list[dict[str, str]] | None:
    """The options that differ between the independent runs; None if their number is not known
    here.

    Raises:
        ConfigError: there can be no such runs.
    """
    if config.cuda_ids is None and not config.cpu:
        devices = None if config.vary is None else 1
    else:
        devices = len(devices_of(config.cuda_ids, None))
    if devices is None:
        return None
    settings = settings_of(config.vary, devices)
    for one in settings:
        config.alone().varied([f"{name}={value}" for name, value in one.items()])
    return settings


def _rows_of_one(config: TrainConfig, num_rows: int | None) -> int | None:
    """The rows that one run sees in an epoch: of shares, the largest."""
    if not config.parallel_independent or config.vary is not None:
        return num_rows
    settings = _settings(config)
    if settings is None or num_rows is None:
        return None
    return samples_of_shard(num_rows, settings[0]["shard"])


def _of_runs(config: TrainConfig, num_rows: int | None) -> list[tuple[str, str]]:
    """Lines on the rows, and on the runs if there are several."""
    rows = [] if num_rows is None else [("Rows", f"{num_rows:,}")]
    if not config.parallel_independent:
        return rows
    settings = _settings(config)
    if settings is None:
        return [("Runs", "one on each GPU, each on its share of the rows"), *rows]
    apart = "each on its share of the rows"
    if config.vary is not None:
        apart = f"which differ in {', '.join(settings[0])}"
    return [("Runs", f"{len(settings)}, {apart}"), *rows]


def _figures(plan: BatchPlan, config: TrainConfig) -> list[tuple[str, str]]:
    """The lines of the plan; of independent runs, of one of them.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    figures = []
    if plan.num_samples is not None:
        tail = f"the last of {plan.tail_samples} samples" if plan.tail_samples else "all whole"
        figures.append(("Updates per epoch", f"{plan.updates_per_epoch:,}, {tail}"))
    lr = scale_lr(config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size)
    total = config.steps or (
        plan.updates_per_epoch * (config.epochs or 1) if plan.updates_per_epoch else None
    )
    if total is None:
        figures.append(("Updates in all", "known when the data is read"))
    else:
        warmup = warmup_updates(config.warmup, total, plan.updates_per_epoch)
        figures += [
            ("Updates in all", f"{total:,}"),
            ("Warm-up", f"{warmup:,} updates" if warmup else "none"),
        ]
    scaled = "" if lr == config.lr else f", {config.lr_scaling} from {config.lr:g}"
    figures.append(("Learning rate", f"{lr:g}, {config.scheduler}{scaled}"))
    return figures


def _warnings(plan: BatchPlan, config: TrainConfig, launch: LaunchSpec | None) -> list[str]:
    found, num_rows = [], plan.num_samples
    batch, steps = plan.micro_batch_size, plan.gradient_accumulation_steps
    if steps >= 8 and batch <= 2:
        found.append(
            f"B = {batch} leaves a device mostly idle: if memory allows, a larger batch size with "
            "fewer accumulation steps makes the same update faster."
        )
    if num_rows is not None and plan.global_batch_size > num_rows:
        found.append(
            f"An epoch of {num_rows:,} rows is less than one effective batch of "
            f"{plan.global_batch_size:,}: each epoch is one update."
        )
    if config.lr_scaling != "none" and steps > 1:
        found.append(
            "The scaled learning rate is a starting point: check it by a short run at half and "
            "twice the rate."
        )
    if launch is not None and not config.cpu and launch.num_processes > 1:
        found.append(f"This needs {launch.num_processes} GPUs, or the switch “On the CPU”.")
    return found


def _field_of(message: str) -> str:
    """The field that a message is about, or ""."""
    for named in re.finditer(
        r"(\w+)=|(data file) |^(cpu_offload|activation_offload|parallel_independent) ", message
    ):
        name = named[1] or named[2] or named[3]
        name = _OTHER_NAMES.get(name, name)
        if name in FIELDS:
            return name
    return ""
