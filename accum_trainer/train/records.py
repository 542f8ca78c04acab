"""The run directory: what a run leaves for people and programs to read.

config.yaml     the composed configuration
plan.json       B, K, W, B_eff, updates per epoch, engine, versions, seed
metrics.jsonl   one record per update
loss.png        loss and learning rate over updates
result.json     how the run ended: done or stopped, updates, samples
logs/           one log per process, where `accum-trainer launch` started it
checkpoints/    see `checkpoint`
model/          what `from_pretrained` loads; with LoRA the adapter
model-merged/   the base model with the adapter merged in, where asked for
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from accum_trainer.errors import ConfigError

CONFIG, PLAN, METRICS, PICTURE, RESULT, LOGS, CHECKPOINTS, MODEL, MERGED = (
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "loss.png",
    "result.json",
    "logs",
    "checkpoints",
    "model",
    "model-merged",
)
Record = dict[str, Any]


def new_run_folder(model: str) -> Path:
    """Where a run goes that was given no folder: runs/<model>-<date>-<time>."""
    return Path("runs") / f"{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output_dir(path: Path, resume: str) -> None:
    """Raise a ConfigError unless a run can live in `path`: it can be written, and holds nothing or
    a run to continue."""
    if path.is_dir() and any(entry.name != LOGS for entry in path.iterdir()):
        if not (path / CONFIG).is_file():
            raise ConfigError(
                f"output_dir={path} holds other files and no run ({CONFIG} is missing); choose a "
                "new or empty folder"
            )
        if resume == "never":
            raise ConfigError(
                f"output_dir={path} already holds a run and resume=never; choose another folder, "
                "or resume=auto"
            )
    _check_writable("output_dir", path)


def check_log_file(path: Path) -> None:
    """Raise a ConfigError unless records can be written to `path`: it can be made, or holds records
    and nothing else."""
    if path.is_dir():
        raise ConfigError(f"log_file={path} is a folder; name a file")
    if path.is_file() and path.stat().st_size:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        if '"effective_batch_size"' not in first:
            raise ConfigError(
                f"log_file={path} exists and does not hold records; name another file"
            )
    _check_writable("log_file", path)


def _check_writable(option: str, path: Path) -> None:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    wanted = os.W_OK if existing.is_file() and existing == path else os.W_OK | os.X_OK
    is_parent = existing != path
    if (is_parent and not existing.is_dir()) or (
        option == "output_dir" and path.exists() and not path.is_dir()
    ):
        raise ConfigError(f"{option}={path} cannot be written: {existing} is a file, not a folder")
    if not os.access(existing, wanted):
        raise ConfigError(f"{option}={path} cannot be written: no permission in {existing}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


class RecordWriter:
    """Appends one JSON line per update to metrics.jsonl, and to a second file where asked.

    Args:
        path: metrics.jsonl; created, or cut to its first `kept` records.
        copy: the second file (`--log-file`), brought to the same content.
        kept: records that a resumed run keeps; what came after its checkpoint is made again.
        earlier: a metrics.jsonl to take the kept records from, where it is another run's.
    """

    def __init__(
        self, path: Path, copy: Path | None = None, kept: int = 0, earlier: Path | None = None
    ) -> None:
        source = earlier or path
        self.records = read_records(source)[:kept] if kept else []
        if len(self.records) < kept:
            raise ConfigError(
                f"{source} has {len(self.records)} records, but the checkpoint was written after "
                f"{kept}"
            )
        self._files = []
        for target in [path, *([copy] if copy else [])]:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            partial.write_text("".join(_line(record) for record in self.records), encoding="utf-8")
            partial.replace(target)
            self._files.append(open(target, "a", encoding="utf-8"))  # noqa: SIM115 - closed by close()

    def write(self, record: Record) -> None:
        """Append a record and hand it to the operating system."""
        self.records.append(record)
        for file in self._files:
            file.write(_line(record))
            file.flush()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _line(record: Record) -> str:
    # JSON has no nan and inf; readers in other languages refuse Python's spelling of them.
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(plain) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that a killed process left unfinished is not
    one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def draw_loss(runs: Mapping[str, Sequence[Record]], path: Path, title: str) -> None:
    """Draw loss, and below it the learning rate, over optimizer updates; one curve per run (label
    -> records)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    # Curves that should lie on one another must both be seen: later ones are dashed.
    for (label, records), style in zip(runs.items(), cycle(["-", "-", (0, (3, 3))]), strict=False):
        made = [record for record in records if not record["skipped"]]
        top.plot(
            [r["step"] for r in made],
            [r["loss"] for r in made],
            label=label,
            linewidth=1.4,
            linestyle=style,
        )
        bottom.plot(
            [r["step"] for r in made], [r["lr"] for r in made], linewidth=1.4, linestyle=style
        )
        evaluated = [record for record in made if record.get("eval_loss") is not None]
        if evaluated:
            top.plot(
                [r["step"] for r in evaluated],
                [r["eval_loss"] for r in evaluated],
                "o--",
                markersize=3,
                label=f"{label}, evaluation",
            )
    top.set(ylabel="loss (mean per target)", title=title)
    bottom.set(xlabel="optimizer updates", ylabel="learning rate")
    top.legend(frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def cast_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights with all floating ones in `dtype`; one that has it is not copied."""
    return {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}


def state_dtype(config: Path, dtype: torch.dtype) -> None:
    """Name `dtype` in a saved model's config.json, so that `from_pretrained` loads it so."""
    stated = json.loads(config.read_text())
    stated.pop("torch_dtype", None)
    config.write_text(json.dumps(stated | {"dtype": str(dtype).removeprefix("torch.")}, indent=2))
