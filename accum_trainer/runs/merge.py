"""Merging: the results of runs from the same initial weights become one model.

    runs/NAME/independent.json     {"runs": [{"name": "part-0", "settings": {"shard": "0/4"}}, ...]}
    runs/NAME/part-0/ ...          an ordinary run directory each
    runs/NAME/merged/       what `from_pretrained` loads, and merge.json: of what it was made, and
                          how good it is

`parts` says which runs have a common mean, `average` makes it; here is where it goes, and the
evaluation of the parts and of the merge on the same rows.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accum_trainer import __version__
from accum_trainer.config import TrainConfig
from accum_trainer.data.files import check_file
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.errors import ConfigError
from accum_trainer.lm.model import TINY, fingerprint, load_model, load_tokenizer
from accum_trainer.runs.average import (
    ADAPTER_CONFIG,
    SavedModel,
    adapter_scale,
    add_adapters,
    average_models,
    check_alike,
    concat_adapters,
)
from accum_trainer.runs.merge_inputs import INDEPENDENT, MergeInput, find_merge_inputs
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.train import run_folder as files
from accum_trainer.train.evaluation import micro_batch_losses
from accum_trainer.train.rows import load_rows
from accum_trainer.window_plan import Cut

MERGED, REPORT = "merged", "merge.json"


@dataclass(frozen=True)
class Merged:
    """What was merged and how it did.

    Attributes:
        folder: with the merged model, and this report as merge.json.
        method: `mean` of whole models; of adapters `concat` (one adapter) or `product` (a whole
            model).
        evaluated_on: the rows of the losses; None where nothing was evaluated.
        part_losses: mean loss per target of each part.
        loss: the same of the merged model.
        notes: what a person should know.
    """

    folder: Path
    method: str
    parts: tuple[MergeInput, ...]
    evaluated_on: str | None
    part_losses: tuple[float | None, ...]
    loss: float | None
    notes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        return sum(part.num_samples for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as merge.json has it."""
        return {
            "method": self.method,
            "parts": [
                {
                    "name": part.name,
                    "folder": str(part.folder),
                    "shard": part.plan.get("shard"),
                    "done": not part.progress,
                    "num_samples": part.num_samples,
                    "weight": part.num_samples / self.num_samples,
                    "eval_loss": _finite(loss),
                }
                for part, loss in zip(self.parts, self.part_losses, strict=True)
            ],
            "num_samples": self.num_samples,
            "eval_loss": _finite(self.loss),
            "evaluated_on": self.evaluated_on,
            "initial_weights": self.parts[0].plan["initial_weights"],
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
) -> Merged:
    """Merge runs, each weighted by the samples it was trained on; nothing is written where anything
    is refused.

    Args:
        runs: the folder of a parallel-independent run, or two or more run directories.
        output: folder of the result. Default: `merged` in the folder of the parallel-independent
            run.
        adapter: how LoRA adapters are merged, `concat` (default) or `product`; see `average`.
        eval_file: rows to evaluate on. Default: the runs' own, or the embedded corpus's where they
            trained on it.
        allow_unfinished: take runs that did not come to their end as they stand.
        force: replace an earlier merge.

    Raises:
        ConfigError: runs that have no common mean, or options that cannot be obeyed.
        CheckpointError: a run whose files are missing or damaged.
        DataError: rows to evaluate on that cannot be read.
    """
    parts, notes = find_merge_inputs(runs, allow_unfinished)
    folder = _output_folder(runs, output, force)
    models = [SavedModel(part.folder / files.MODEL, part.name) for part in parts]
    check_alike(models)
    method = _method(adapter, models)
    origin = _Origin(
        TrainConfig.from_yaml(parts[0].folder / files.CONFIG),
        models[0].folder,
        parts[0].plan["initial_weights"],
    )
    evaluated_on, note = _choose_rows(origin.config, eval_file)
    if models[0].is_adapter and (evaluated_on is not None or method == "product"):
        try:
            origin.check()
        except ConfigError as error:
            if method == "product":
                raise
            evaluated_on, note = None, str(error)
    rows = None if evaluated_on is None else _load_rows(origin, evaluated_on)
    if note:
        notes.append(f"nothing was evaluated: {note}")

    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        notes += _write(method, models, [part.num_samples for part in parts], partial, origin)
        written = [*(model.folder for model in models), partial]
        *part_losses, loss = [
            None if rows is None else _evaluate(path, rows, origin) for path in written
        ]
        merged = Merged(
            folder, method, tuple(parts), evaluated_on, tuple(part_losses), loss, tuple(notes)
        )
        files.write_json(partial / REPORT, merged.to_dict())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merged


def _output_folder(runs: Sequence[str | Path], output: str | Path | None, force: bool) -> Path:
    if output is None:
        if len(runs) > 1 or not (Path(runs[0]) / INDEPENDENT).is_file():
            raise ConfigError(
                "runs named one by one have no folder in common; say with -o DIR where the merge "
                "goes"
            )
        output = Path(runs[0]) / MERGED
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


def _method(adapter: str | None, models: Sequence[SavedModel]) -> str:
    if not models[0].is_adapter:
        if adapter is not None:
            raise ConfigError(
                f"adapter={adapter} is for LoRA adapters, but the parts are whole models; leave it "
                "out"
            )
        return "mean"
    for model in models:
        adapter_scale(model)  # refuses what cannot be merged
    if adapter not in (None, "concat", "product"):
        raise ConfigError(f"adapter={adapter} is not known; give concat or product")
    return adapter or "concat"


def _write(
    method: str, models: Sequence[SavedModel], counts: Sequence[int], folder: Path, origin: _Origin
) -> list[str]:
    """Write the merged model to a new folder; return what to note."""
    if method == "mean":
        return average_models(models, counts, folder)
    if method == "concat":
        return concat_adapters(models, counts, folder)
    base = origin.load().to(origin.dtype())
    notes = add_adapters(base, models, counts)
    base.save_pretrained(folder)
    origin.tokenizer.save_pretrained(folder)
    return notes


class _Origin:
    """The weights that the runs started from, which adapters need.

    Args:
        config: of the first run; the others started from the same weights.
        model: folder of its result, with the tokenizer.
        initial_weights: fingerprint of those weights.
    """

    def __init__(self, config: TrainConfig, model: Path, initial_weights: str) -> None:
        # The first run's tokenizer was saved with its chat template.
        self.config = replace(
            config,
            gradient_checkpointing=False,
            merge_adapter=False,
            attention=None,
            chat_template=None,
        )
        self._model, self._initial_weights = model, initial_weights
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The one saved with the first run."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(replace(self.config, model=str(self._model)))
        return self._tokenizer

    def check(self) -> None:
        """Raise a ConfigError unless the runs' initial weights, adapters included, can be made
        again here."""
        with _seeded(self.config.seed):
            found = fingerprint(load_model(self.config, self.tokenizer))
        if found != self._initial_weights:
            raise ConfigError(
                f"the runs started from weights {self._initial_weights}, but "
                f"model={self.config.model} gives {found} here: "
                "it has changed, or this version of torch draws other random numbers; give back "
                "the model that was trained"
            )

    def load(self) -> Any:
        """The model without adapters, in float32."""
        with _seeded(self.config.seed):
            return load_model(self.config.without_peft(), self.tokenizer)

    def dtype(self) -> torch.dtype:
        """The dtype that the model is stored in."""
        if self.config.model == TINY:
            return torch.float32
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.config.model).dtype or torch.float32


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw what a training with this seed draws, and leave the caller's generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# --- evaluation ---

_EMBEDDED = "evaluation rows of the embedded corpus"


def _choose_rows(config: TrainConfig, eval_file: str | Path | None) -> tuple[str | None, str]:
    """What to evaluate on, or None and why not."""
    if eval_file is not None:
        return str(check_file(eval_file)), ""
    if config.eval_file is not None:
        if Path(config.eval_file).is_file():
            return config.eval_file, ""
        return None, f"the runs' eval_file={config.eval_file} is not here; name it with --eval-file"
    if config.dataset_file is None and config.dataset is None:
        return _EMBEDDED, ""
    return None, "the runs had no eval_file; name one with --eval-file"


def _load_rows(origin: _Origin, chosen: str) -> TokenizedRows:
    if chosen == _EMBEDDED:
        rows = load_rows(replace(origin.config, eval_every=1), origin.tokenizer)[1]
        assert rows is not None
        return rows
    only = replace(
        origin.config, dataset_file=chosen, dataset=None, eval_file=None, eval_every=None
    )
    return load_rows(only, origin.tokenizer)[0]


def _evaluate(folder: Path, rows: TokenizedRows, origin: _Origin) -> float:
    """Mean loss per target of the model or adapter in `folder`, in float32."""
    if (folder / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(origin.load(), str(folder))
    else:
        model = load_model(
            replace(origin.config.without_peft(), model=str(folder)), origin.tokenizer
        )
    device = torch.device("cuda" if torch.cuda.is_available() and not origin.config.cpu else "cpu")
    config = origin.config
    size = (
        config.batch_size
        if isinstance(config.batch_size, int)
        else None
        if config.max_tokens_per_micro_batch
        else 4
    )
    micro_batches = Cut(size, config.max_tokens_per_micro_batch).assign_to_ranks(rows.lengths, 1)[0]
    pad = PaddingCollator(origin.tokenizer.pad_token_id or 0)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for micro_batch in micro_batches:
            yield {
                key: value.to(device)
                for key, value in pad([rows[int(i)] for i in micro_batch]).items()
            }

    return sum(micro_batch_losses(model.to(device), batches())) / int(rows.num_targets.sum())


def _finite(loss: float | None) -> float | None:
    """JSON has no nan."""
    return loss if loss is not None and math.isfinite(loss) else None
