"""The inputs of a merge: runs read from their run directories, and refused unless they have a
common mean.

Runs of a sweep have none; the message names the best of them. Knows run directories and the files
that parallel-independent runs leave beside them; nothing of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.batch_plan import parse_shard
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.runs.independent_files import INDEPENDENT, listed_runs
from accum_trainer.runs.inside import check_inside, check_tree
from accum_trainer.runs.json_file import read_json
from accum_trainer.train import run_folder as files
from accum_trainer.train.model_origin import is_left_behind, read_origin
from accum_trainer.train.records import read_records


@dataclass(frozen=True)
class MergeInput:
    """One run of a merge.

    Attributes:
        name: in tables and messages.
        folder: its run directory.
        num_samples: samples of all its updates, repeats counted; its weight in the mean.
        progress: "" if it is done, else how far it came.
        plan: its plan.json.
    """

    name: str
    folder: Path
    num_samples: int
    progress: str
    plan: dict[str, Any]


def find_merge_inputs(
    paths: Sequence[str | Path], allow_unfinished: bool = False
) -> tuple[list[MergeInput], list[str]]:
    """(inputs, notes for the user) of the runs at `paths`.

    Raises:
        ConfigError: fewer than two runs, one given twice, a sweep, one unfinished (unless allowed),
            of no sample, or from other initial weights than the first.
        CheckpointError: a folder is no run, or its files are damaged.
    """
    found = [one for path in paths for one in _expand(Path(path))]
    if len(found) < 2:
        raise ConfigError(
            f"{found[0][1]} is one run, and a merge needs two or more; name the others too, or the "
            "folder of a parallel-independent run"
        )
    for index, (name, folder) in enumerate(found):
        if any(folder.resolve() == other.resolve() for _, other in found[:index]):
            raise ConfigError(f"{name} is given twice, and would count twice; name each run once")
    inputs = [_read_run(name, folder) for name, folder in found]
    unfinished = [run for run in inputs if run.progress]
    if unfinished and not allow_unfinished:
        listed = "; ".join(f"{run.name} {run.progress}" for run in unfinished)
        raise ConfigError(
            f"unfinished: {listed}. The same train command continues a run; --allow-unfinished "
            "merges them as they are"
        )
    for run in unfinished:
        _check_has_its_model(run)
    for run in inputs:
        _check_has_mean_with(inputs[0], run)
    notes = [f"{run.name} is unfinished: {run.progress}" for run in unfinished]
    return inputs, notes + _overlaps(inputs)


def _check_has_its_model(run: MergeInput) -> None:
    """Raise a ConfigError if model/ of an unfinished run is missing, or of another update than its
    newest checkpoint."""
    if not is_left_behind(run.folder):
        return
    model, origin = run.folder / files.MODEL, read_origin(run.folder / files.MODEL)
    export = f"`accum-trainer checkpoint export {run.folder} -o {model}`"
    if not model.exists():
        raise ConfigError(
            f"{run.name} {run.progress}, and has no model yet; {export} writes that of its newest "
            "checkpoint"
        )
    of = f"update {origin.updates}" if origin is not None else "an earlier end"
    raise ConfigError(
        f"{run.name} {run.progress}, but {model} is that of {of}, which is not its newest "
        f"checkpoint; move it away, and {export} writes the newest"
    )


def _check_has_mean_with(first: MergeInput, run: MergeInput) -> None:
    if run.num_samples == 0:
        raise ConfigError(
            f"{run.name} was trained on 0 samples, so it has no weight in the mean; leave it out"
        )
    weights, expected = run.plan.get("initial_weights"), first.plan.get("initial_weights")
    if weights is None or weights != expected:
        raise ConfigError(
            f"{first.name} started from weights {expected}, {run.name} from {weights} "
            f"(initial_weights in {files.PLAN}): the mean of runs from different starts is no "
            "model; merge runs of the same model and seed"
        )


def best_run(folder: Path, runs: Sequence[Mapping[str, Any]]) -> str:
    """The best of a sweep's finished runs as text: its name, settings, loss and model; "" if none
    has a finite loss.

    Compares the last evaluation loss if all have one, else the loss of the last update.

    Args:
        folder: of all runs.
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
            listed = " ".join(f"{option}={value}" for option, value in settings.items())
            return (
                f"{best} {listed}, {key} {finite[best]:.4f}; its model is "
                f"{folder / best / files.MODEL}"
            )
    return ""


def _refuse_sweep(folder: Path, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Runs of a sweep compete with each other; the mean of their weights is the result of no
    setting."""
    varied = {option for _, settings in runs for option in settings} - {"shard"}
    if not varied:
        return
    best = best_run(folder, [{"name": name, "settings": settings} for name, settings in runs])
    raise ConfigError(
        f"{folder} is a sweep: its {len(runs)} runs differ in {', '.join(sorted(varied))}, so "
        "their mean is the result of none of these. "
        f"{f'The best is {best}' if best else 'None has finished'}. To average runs all the same, "
        "name their run directories one by one"
    )


def _expand(path: Path) -> list[tuple[str, Path]]:
    """(name, run directory) of each run of a parallel-independent run, or of the run itself."""
    if (path / INDEPENDENT).is_file():
        remedy = "name the run directories one by one"
        runs = listed_runs(path, remedy)
        names = [name for name, _ in runs]
        for name in names:
            check_inside(path / name, path, remedy)
        _refuse_sweep(path, runs)
        missing = [name for name in names if not _is_run(path / name)]
        if missing:
            raise CheckpointError(
                f"{', '.join(missing)} of {path} is missing: {INDEPENDENT} lists {len(names)} "
                f"runs, and {path / missing[0]} holds none; start it again, or name the run "
                "directories to merge"
            )
        return [(name, path / name) for name in names]
    if not _is_run(path):
        problem = "does not exist" if not path.exists() else "is no run"
        raise CheckpointError(
            f"{path} {problem}; name a folder with {INDEPENDENT}, or run directories "
            f"({files.CONFIG}, {files.PLAN})"
        )
    return [(str(path), path)]


def _is_run(folder: Path) -> bool:
    return (folder / files.CONFIG).is_file() and (folder / files.PLAN).is_file()


def _read_run(name: str, folder: Path) -> MergeInput:
    for file in (files.CONFIG, files.PLAN, files.RESULT, files.METRICS):
        check_inside(folder / file, folder, "put a copy in its place")
    check_tree(folder / files.MODEL, folder)
    plan = read_json(folder / files.PLAN)
    result = read_json(folder / files.RESULT) if (folder / files.RESULT).is_file() else None
    if result is not None:
        updates, num_samples = result.get("updates"), result.get("num_samples")
        stopped = f"stopped by {result.get('stopped_by') or 'its caller'}"
    else:
        try:
            records = read_records(folder / files.METRICS)
            made = [record for record in records if not record["skipped"]]
            num_samples = sum(record["effective_batch_size"] for record in made)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / files.METRICS} is damaged: {error!r}") from None
        updates, stopped = len(made), f"is running, or was killed ({files.RESULT} is missing)"
    done = result is not None and result.get("done") is True
    if not done and (origin := read_origin(folder / files.MODEL)) is not None:
        num_samples = origin.num_samples  # a killed run has records of later updates
    if (
        not isinstance(num_samples, int)
        or isinstance(num_samples, bool)
        or not 0 <= num_samples < 2**53
    ):
        raise CheckpointError(
            f"{folder / files.RESULT} has no num_samples, the number of samples trained on, but "
            f"{num_samples}"
        )
    progress = "" if done else f"{stopped} after {updates} of {plan.get('total_updates')} updates"
    return MergeInput(name, folder, num_samples, progress, plan)


def _overlaps(inputs: Sequence[MergeInput]) -> list[str]:
    """A note for each two shares with samples in common: i/n and j/m, if i = j modulo gcd(n, m).
    Runs without a share are meant to see the same samples."""
    shards = [(run.name, run.plan["shard"]) for run in inputs if run.plan.get("shard")]
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
