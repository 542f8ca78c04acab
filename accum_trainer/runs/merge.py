"""Merge runs: the results of runs from the same initial weights become one model.

    runs/NAME/independent.json     {"runs": [{"name": "part-0", "settings": {"shard": "0/4"}}, ...]}
    runs/NAME/part-0/ ...          an ordinary run directory each
    runs/NAME/merged/              a model for `from_pretrained`, and merge.json: its inputs and its
                                   evaluation

`merge_inputs` finds the runs and refuses those without a common mean, `average` computes it,
`evaluation` compares the inputs and the merge on the same rows. This module puts them together and
writes all or nothing.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accum_trainer import __version__
from accum_trainer.config import TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.runs.average import (
    adapter_scale,
    add_adapters,
    average_models,
    concat_adapters,
)
from accum_trainer.runs.evaluation import choose_rows, evaluate, load_evaluation_rows
from accum_trainer.runs.independent_files import INDEPENDENT, MERGED, REPORT
from accum_trainer.runs.merge_inputs import MergeInput, find_merge_inputs
from accum_trainer.runs.origin import Origin
from accum_trainer.runs.saved_model import SavedModel, check_alike
from accum_trainer.train import run_folder as files
from accum_trainer.train.model_card import CARD, merged_card


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        folder: with the merged model, and this report as merge.json.
        method: `mean` of whole models; of adapters `concat` (one adapter) or `product` (a whole
            model).
        evaluated_on: the rows of the losses; None if nothing was evaluated.
        input_losses: mean loss per target of each input.
        loss: the same of the merged model.
        notes: for the user.
    """

    folder: Path
    method: str
    inputs: tuple[MergeInput, ...]
    evaluated_on: str | None
    input_losses: tuple[float | None, ...]
    loss: float | None
    notes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        return sum(run.num_samples for run in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """The report as merge.json has it."""
        return {
            "method": self.method,
            "parts": [
                {
                    "name": run.name,
                    "folder": str(run.folder),
                    "shard": run.plan.get("shard"),
                    "done": not run.progress,
                    "num_samples": run.num_samples,
                    "weight": run.num_samples / self.num_samples,
                    "eval_loss": _finite(loss),
                }
                for run, loss in zip(self.inputs, self.input_losses, strict=True)
            ],
            "num_samples": self.num_samples,
            "eval_loss": _finite(self.loss),
            "evaluated_on": self.evaluated_on,
            "initial_weights": self.inputs[0].plan["initial_weights"],
            "notes": list(self.notes),
            "versions": {
                "accum_trainer": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }


def merge(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    adapter: str | None = None,
    eval_file: str | Path | None = None,
    allow_unfinished: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge runs, each weighted by the samples it was trained on. A refusal writes nothing.

    Args:
        runs: the folder of a parallel-independent run, or two or more run directories.
        output: folder of the result. Default: `merged` in the folder of the parallel-independent
            run.
        adapter: how LoRA adapters are merged, `concat` (default) or `product`; see `average`.
        eval_file: rows to evaluate on. Default: the runs' own; the embedded corpus's, if they
            trained on it.
        allow_unfinished: merge unfinished runs as they are.
        force: replace an earlier merge.
        trust_remote_code: let the runs' models run Python code that comes with them; that a run
            was trained so does not count, since it may come from others.

    Raises:
        ConfigError: the runs have no common mean, or an option cannot be followed.
        CheckpointError: files of a run are missing or damaged.
        DataError: the rows to evaluate on cannot be read.
    """
    inputs, notes = find_merge_inputs(runs, allow_unfinished)
    folder = _output_folder(runs, output, force)
    models = [SavedModel(run.folder / files.MODEL, run.name) for run in inputs]
    check_alike(models)
    method = _method(adapter, models)
    origin = Origin(
        TrainConfig.from_yaml(inputs[0].folder / files.CONFIG, trust_remote_code=trust_remote_code),
        models[0].folder,
        inputs[0].plan["initial_weights"],
    )
    evaluated_on, note = choose_rows(origin.config, eval_file)
    if models[0].is_adapter and (evaluated_on is not None or method == "product"):
        try:
            origin.check()
        except ConfigError as error:
            if method == "product":
                raise
            evaluated_on, note = None, str(error)
    rows = None if evaluated_on is None else load_evaluation_rows(origin, evaluated_on)
    if note:
        notes.append(f"nothing was evaluated: {note}")

    place = Path(os.path.realpath(folder))  # a link that the user named stays one
    partial = place.with_name(f".{place.name}.partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        notes += _write(method, models, [run.num_samples for run in inputs], partial, origin)
        *input_losses, loss = [
            None if rows is None else evaluate(path, rows, origin)
            for path in (*(model.folder for model in models), partial)
        ]
        merged = Merged(
            folder, method, tuple(inputs), evaluated_on, tuple(input_losses), loss, tuple(notes)
        )
        files.write_json(partial / REPORT, merged.to_dict())
        samples = {run.name: run.num_samples for run in inputs}
        card = merged_card(origin.config, method, samples)
        (partial / CARD).write_text(card, encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merged


def _output_folder(runs: Sequence[str | Path], output: str | Path | None, force: bool) -> Path:
    if output is None:
        if len(runs) > 1 or not (Path(runs[0]) / INDEPENDENT).is_file():
            raise ConfigError(
                "runs named one by one have no common folder; name the folder of the merge with -o "
                "DIR"
            )
        output = Path(runs[0]) / MERGED
        if output.is_symlink():
            raise ConfigError(
                f"{output} is a link to {os.path.realpath(output)}; remove it, or name the folder "
                "of the merge with -o DIR"
            )
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / REPORT).is_file():
            raise ConfigError(
                f"output={folder} exists and is no merge ({REPORT} is missing); choose another "
                "folder"
            )
        if not force:
            raise ConfigError(
                f"output={folder} holds a merge already; choose another folder, or replace it with "
                "--force"
            )
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output={folder} cannot be written: {existing} is no folder that may be written to"
        )
    return folder


def _remove(path: Path) -> None:
    """Remove what an earlier merge left; of a link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _method(adapter: str | None, models: Sequence[SavedModel]) -> str:
    if not models[0].is_adapter:
        if adapter is not None:
            raise ConfigError(
                f"adapter={adapter} is for LoRA adapters, but the runs are whole models; leave it "
                "out"
            )
        return "mean"
    for model in models:
        adapter_scale(model)  # refuses adapters that cannot be merged
    if adapter not in (None, "concat", "product"):
        raise ConfigError(f"adapter={adapter} is not known; give concat or product")
    return adapter or "concat"


def _write(
    method: str, models: Sequence[SavedModel], counts: Sequence[int], folder: Path, origin: Origin
) -> list[str]:
    """Write the merged model to a new folder; returns notes for the user."""
    if method == "mean":
        return average_models(models, counts, folder)
    if method == "concat":
        return concat_adapters(models, counts, folder)
    base = origin.load().to(origin.dtype())
    notes = add_adapters(base, models, counts)
    base.save_pretrained(folder)
    origin.tokenizer.save_pretrained(folder)
    return notes


def _finite(loss: float | None) -> float | None:
    """None for nan and inf, which JSON does not have."""
    return loss if loss is not None and math.isfinite(loss) else None
