"""The run directory: its files, who may use a folder, and writing it.

config.yaml           the composed configuration
plan.json             B, K, W, B_eff, updates per epoch, engine, versions, seed
metrics.jsonl         one record per update
loss.png              loss and learning rate over updates
result.json           how the run ended: done or stopped, updates, samples
logs/                 one log per process, if `accum-trainer launch` or a panel started it
checkpoints/          see `checkpoint`
last-checkpoint.json  which of them was written last
trackers.json         under which ids trackers know the run, see `trackers`
tensorboard/, wandb/  what these trackers write, if --report-to names them
model/                for `from_pretrained`; with LoRA the adapter
model-merged/         the base model with the adapter merged in, if asked for
run.lock              the process that trains in this directory, see `run_lock`

Knows no model and no engine; only the main process writes. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from accum_trainer.config import TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.launch.folders import make_folder, remove_folders
from accum_trainer.train import durable
from accum_trainer.train.loss_picture import CURVES, draw_loss
from accum_trainer.train.records import Record, RecordWriter, Tally, read_records
from accum_trainer.train.run_lock import LOCK, RunLock

CONFIG, PLAN, METRICS, PICTURE, RESULT, LOGS, CHECKPOINTS, LAST, MODEL, MERGED = (
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "loss.png",
    "result.json",
    "logs",
    "checkpoints",
    "last-checkpoint.json",
    "model",
    "model-merged",
)
TRACKER_NOTES, TENSORBOARD = "trackers.json", "tensorboard"
# `stopped_by` in result.json of a run that diverged.
DIVERGENCE = "divergence"


def new_run_folder(model: str) -> Path:
    """The default run directory: runs/<model>-<date>-<time>."""
    return Path("runs") / f"{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_places(config: TrainConfig) -> None:
    """Raise a ConfigError if the run directory or the log file of `config` cannot be used."""
    if config.output_dir is not None:
        check_output_dir(Path(config.output_dir), config.resume)
    if config.log_file is not None:
        check_log_file(Path(config.log_file))


def check_output_dir(path: Path, resume: str) -> None:
    """Raise a ConfigError unless a run can live in `path`: it is writable, and empty or a run to
    continue."""
    if path.is_dir() and any(_is_of_a_run(entry) for entry in path.iterdir()):
        if not holds_run(path):
            raise ConfigError(
                f"output_dir={path} holds other files and no run ({CONFIG} is missing); choose a "
                "new or empty folder"
            )
        if resume == "never":
            raise ConfigError(
                f"output_dir={path} already holds a run and resume=never; choose another folder, "
                "or resume=auto to continue it, or resume=anew to replace it"
            )
    check_writable("output_dir", path)


def _is_of_a_run(entry: Path) -> bool:
    """Whether this is more than what is in a run directory before its run."""
    return entry.name != LOGS and not entry.name.lstrip(".").startswith(LOCK)


def check_log_file(path: Path) -> None:
    """Raise a ConfigError unless records can be written to `path`: it is new and writable, or holds
    records only."""
    if path.is_dir():
        raise ConfigError(f"log_file={path} is a folder; name a file")
    if path.is_file() and path.stat().st_size:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        if '"effective_batch_size"' not in first:
            raise ConfigError(
                f"log_file={path} exists and does not hold records; name another file"
            )
    check_writable("log_file", path)


def check_writable(option: str, path: Path) -> None:
    """Raise a ConfigError if the file or folder `path` that `option` names cannot be made."""
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
    """Write `value` as indented JSON; the file is replaced whole."""
    durable.write_text(path, json.dumps(value, indent=1) + "\n")


def holds_run(path: Path) -> bool:
    """Whether a run was started in this directory: one of its files may have been lost."""
    found = {name for name in (CONFIG, PLAN, METRICS, LAST) if (path / name).is_file()}
    return bool(found & {CONFIG, LAST}) or found == {PLAN, METRICS}


class RunFolder:
    """One run's directory while it trains.

    Every process has one and counts records; the main process calls `start` and so writes them.

    Attributes:
        path: the directory.
        tally: of the run's records so far, those before a resume included.
    """

    def __init__(self, path: Path, lock: RunLock | None = None) -> None:
        """
        Args:
            lock: of the directory, if it holds a run already.
        """
        self.path = path
        self.tally = Tally()
        self._lock = lock
        self._made: list[Path] = []
        self._earlier: Path | None = None
        self._writer: RecordWriter | None = None

    def continue_from(self, checkpoint: Path, tally: Tally) -> None:
        """Keep the records that `tally` counts of the run that `checkpoint` lies in."""
        self.tally = tally
        run = checkpoint.parent.parent
        if run != self.path:
            self._earlier = run / METRICS

    def take(self) -> None:
        """Lock the directory.

        Raises:
            ConfigError: another process trains here, or has since this one looked.
        """
        if self._lock is None:
            self._made = make_folder(self.path)
            self._lock = RunLock.take(self.path)
            if holds_run(self.path):
                raise ConfigError(
                    f"output_dir={self.path}: another run was started there meanwhile; choose "
                    "another folder, or give the command again to continue that run"
                )

    def leave(self) -> None:
        """Undo `take`: the run was refused."""
        self.close()
        remove_folders(self._made)

    def start(self, config: TrainConfig, plan: dict[str, Any]) -> None:
        """Write configuration and plan, and open the records, in the directory that was taken."""
        if config.resume == "anew":
            self._remove_run()
        (self.path / RESULT).unlink(missing_ok=True)  # it said how the run ended; now it goes on
        durable.write_text(self.path / CONFIG, config.to_yaml())
        write_json(self.path / PLAN, plan)
        copy = Path(config.log_file) if config.log_file else None
        self._writer = RecordWriter(self.path / METRICS, copy, self.tally, self._earlier)

    def _remove_run(self) -> None:
        """Remove what an earlier run here has written, but for its logs. Trackers have removed
        theirs."""
        for name in (CHECKPOINTS, MODEL, MERGED):
            if (self.path / name).is_symlink():
                (self.path / name).unlink()
            elif (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        for name in (METRICS, PICTURE, LAST):
            (self.path / name).unlink(missing_ok=True)

    def check_lock(self) -> None:
        """Raise an AccumTrainerError if another process has taken this directory over."""
        if self._lock is not None:
            self._lock.check()

    def write(self, record: Record) -> None:
        """Count a record; write it if this process started the directory."""
        self.tally.add(record)
        if self._writer is not None:
            self._writer.write(record)

    def finish(self, title: str, ending: dict[str, Any]) -> None:
        """Draw the records and write result.json: `ending` and the records' totals.

        `num_samples` counts each sample as often as it was trained on.
        """
        assert self._writer is not None, "only the process that started the directory finishes it"
        records = read_records(self.path / METRICS, CURVES)
        if records:
            draw_loss({"training": records}, self.path / PICTURE, title)
        write_json(self.path / RESULT, ending | self.tally.totals())

    def close(self) -> None:
        """Close the records' files and unlock the directory."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.release()
