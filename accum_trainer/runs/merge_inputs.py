"""The runs of a merge: read from their run directories, and only those that have a common mean.

Knows run directories and what parallel-independent runs leave beside them; nothing of weights. A
sweep's runs have none: the best is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.batch_plan import parse_shard
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.train import run_folder as files
from accum_trainer.train.records import read_records

INDEPENDENT = "independent.json"


@dataclass(frozen=True)
class MergeInput:
    """One of the runs that are merged.

    Attributes:
        name: in tables and messages.
        folder: its run directory.
        num_samples: samples of all its updates, each as often as it was trained on; its weight in
            the mean.
        progress: "" where it is done, else how far it came.
        plan: its plan.json.
    """

    name: str
    folder: Path
    num_samples: int
    progress: str
    plan: dict[str, Any]


def find_merge_inputs(
    runs: Sequence[str | Path], allow_unfinished: bool = False
) -> tuple[list[MergeInput], list[str]]:
    """The parts of `runs`, and what to note about them.

    Raises:
        ConfigError: fewer than two, one given twice, a sweep, unfinished (unless allowed), of no
            sample, or from other initial weights than the first.
        CheckpointError: a folder that is no run, or whose files are damaged.
    """
    named = [named for run in runs for named in _expand(Path(run))]
    if len(named) < 2:
        raise ConfigError(
            f"{named[0][1]} is one run, and a merge needs two or more; name the others too, or the "
            "folder of a "
            "parallel-independent run"
        )
    for index, (name, folder) in enumerate(named):
        if any(folder.resolve() == other.resolve() for _, other in named[:index]):
            raise ConfigError(f"{name} is given twice, and would count twice; name each run once")
    parts = [_read_part(name, folder) for name, folder in named]
    unfinished = [part for part in parts if part.progress]
    if unfinished and not allow_unfinished:
        told = "; ".join(f"{part.name} {part.progress}" for part in unfinished)
        raise ConfigError(
            f"unfinished: {told}. The same train command continues a run; --allow-unfinished "
            "merges them as they stand"
        )
    for part in parts:
        if part.num_samples == 0:
            raise ConfigError(
                f"{part.name} was trained on 0 samples, so it has no weight in the mean; leave it "
                "out"
            )
        mine, first = part.plan.get("initial_weights"), parts[0].plan.get("initial_weights")
        if mine is None or mine != first:
            raise ConfigError(
                f"{parts[0].name} started from weights {first}, {part.name} from {mine} "
                f"(initial_weights in {files.PLAN}): "
                "the mean of runs from different starts is no model; merge runs of the same model "
                "and seed"
            )
    return parts, [
        f"{part.name} is unfinished: {part.progress}" for part in unfinished
    ] + _overlaps(parts)


def best_run(folder: Path, runs: Sequence[Mapping[str, Any]]) -> str:
    """The best of a sweep's finished runs, in words: its name, settings, loss and model; "" if none
    has a finite loss.

    By the last evaluation loss if all have one, else by the loss of the last update.

    Args:
        folder: of the set.
        runs: entries of its independent.json.
    """
    results = {}
    for run in runs:
        path = folder / str(run["name"]) / files.RESULT
        result = read_json(path) if path.is_file() else {}
        if result.get("done"):
            results[str(run["name"])] = result
    for key in ("eval_loss", "loss"):
        losses = {name: result.get(key) for name, result in results.items()}
        finite = {
            name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)
        }
        if finite and (key == "loss" or None not in losses.values()):
            best = min(finite, key=lambda name: finite[name])
            settings = next(run["settings"] for run in runs if run["name"] == best)
            told = " ".join(f"{option}={value}" for option, value in settings.items())
            return (
                f"{best} {told}, {key} {finite[best]:.4f}; its model is "
                f"{folder / best / files.MODEL}"
            )
    return ""


def _refuse_sweep(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Runs of a sweep are candidates for one place: their mean is none of them."""
    varied = {option for run in runs for option in run.get("settings", ())} - {"shard"}
    if not varied:
        return
    best = best_run(folder, runs)
    raise ConfigError(
        f"{folder} is a sweep: its {len(runs)} runs differ in {', '.join(sorted(varied))}, so "
        "their mean is the result "
        f"of none of these. {f'The best is {best}' if best else 'None has finished'}. To average "
        "runs all the same, "
        "name their run directories one by one"
    )


def _expand(run: Path) -> list[tuple[str, Path]]:
    """(name, run directory) of each part of a parallel-independent run, or of the run itself."""
    if (run / INDEPENDENT).is_file():
        try:
            runs = read_json(run / INDEPENDENT)["runs"]
            names = [str(entry["name"]) for entry in runs]
        except (KeyError, TypeError):
            runs, names = [], []
        if not names:
            raise CheckpointError(
                f"{run / INDEPENDENT} names no runs; give the run directories one by one"
            )
        _refuse_sweep(run, runs)
        missing = [name for name in names if not _is_run(run / name)]
        if missing:
            raise CheckpointError(
                f"{', '.join(missing)} of {run} is missing: {INDEPENDENT} lists {len(names)} runs, "
                f"and {run / missing[0]} "
                "holds none; start it again, or name the run directories that shall be merged"
            )
        return [(name, run / name) for name in names]
    if not _is_run(run):
        what = "does not exist" if not run.exists() else "is no run"
        raise CheckpointError(
            f"{run} {what}; name a folder with {INDEPENDENT}, or run directories ({files.CONFIG}, "
            f"{files.PLAN})"
        )
    return [(str(run), run)]


def _is_run(folder: Path) -> bool:
    return (folder / files.CONFIG).is_file() and (folder / files.PLAN).is_file()


def _read_part(name: str, folder: Path) -> MergeInput:
    plan = read_json(folder / files.PLAN)
    result = read_json(folder / files.RESULT) if (folder / files.RESULT).is_file() else None
    if result is not None:
        updates, num_samples = result.get("updates"), result.get("num_samples")
        stopped = f"stopped by {result.get('stopped_by') or 'its caller'}"
    else:
        try:
            made = [
                record for record in read_records(folder / files.METRICS) if not record["skipped"]
            ]
            num_samples = sum(record["effective_batch_size"] for record in made)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / files.METRICS} is damaged: {error!r}") from None
        updates, stopped = len(made), f"is running, or was killed ({files.RESULT} is missing)"
    if not isinstance(num_samples, int):
        raise CheckpointError(
            f"{folder / files.RESULT} does not say num_samples, on how many samples it was trained"
        )
    done = result is not None and result.get("done") is True
    progress = "" if done else f"{stopped} after {updates} of {plan.get('total_updates')} updates"
    return MergeInput(name, folder, num_samples, progress, plan)


def _overlaps(parts: Sequence[MergeInput]) -> list[str]:
    """Shares i/n and j/m have samples in common where i = j modulo gcd(n, m). Whole runs are meant
    to see the same."""
    shards = [(part.name, part.plan["shard"]) for part in parts if part.plan.get("shard")]
    notes = []
    for index, (name, shard) in enumerate(shards):
        for other, other_shard in shards[:index]:
            (i, n), (j, m) = parse_shard(shard), parse_shard(other_shard)
            if (i - j) % math.gcd(n, m) == 0:
                notes.append(
                    f"{other} ({other_shard}) and {name} ({shard}) were trained on samples in "
                    "common"
                )
    return notes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value
