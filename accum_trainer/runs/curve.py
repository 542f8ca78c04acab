"""The loss curve of one run over updates, samples and seconds, from its records. Draws nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accum_trainer.errors import ConfigError, DataError
from accum_trainer.runs.log_file import Log, read_log
from accum_trainer.train.run_folder import METRICS

AXES = {"updates": "optimizer updates", "samples": "samples", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Curve:
    """A run as a curve.

    Attributes:
        label: the run's name in tables and pictures, printable.
        log: the records.
        folder: the run directory; None for a file.
        axes: "updates", and "samples" and "seconds" if the log tells them -> how much the run had
            made, seen or taken after each update, shape [updates], increasing.
        split: how an update's batch is made, such as `B 2 x K 16 x W 1 = 32`; "" if not known.
        batch: samples of most updates; None if not known.
        notes: what a reader of the figures should know.
        every: updates from most records to the next.
    """

    label: str
    log: Log
    folder: Path | None
    axes: dict[str, np.ndarray]
    split: str
    batch: int | None
    notes: tuple[str, ...] = ()
    every: int = 1

    @property
    def loss(self) -> np.ndarray:
        """Of each update, shape [updates]."""
        return self.log.columns["loss"]

    @property
    def name(self) -> str:
        """The label with the split."""
        return f"{self.label}: {self.split}" if self.split else self.label

    def total(self, axis: str) -> float | None:
        """Where the run ends on an axis; None if the log does not tell."""
        return float(self.axes[axis][-1]) if axis in self.axes else None

    def loss_at(self, axis: str, place: float) -> float | None:
        """Mean loss per target over the last tenth before `place` on an axis; every update alike if
        the log does not tell its targets. None if the run has no update until there.

        The mean keeps the noise of single batches out of a comparison, and a tenth of the way is
        the same stretch for all runs on that axis.
        """
        if axis not in self.axes:
            return None
        x = self.axes[axis]
        chosen = (x > 0.9 * place) & (x <= place)
        if not chosen.any():  # the updates lie further apart: the last one before it
            before = np.flatnonzero(x <= place)
            return float(self.loss[before[-1]]) if len(before) else None
        weights = self.log.column("num_targets")
        if weights is None or not (weights[chosen] > 0).all():
            return float(self.loss[chosen].mean())
        return float(np.average(self.loss[chosen], weights=weights[chosen]))


def read_curves(
    runs: Sequence[str | Path], batch_sizes: Sequence[int] | None = None
) -> list[Curve]:
    """Read run directories and JSONL files as curves.

    Args:
        runs: a folder without records stands for the run directories in it.
        batch_sizes: samples per update of logs that do not tell: one for all runs, or one for each.

    Raises:
        ConfigError: a run does not exist or is named twice, or the number of `batch_sizes` is
            neither 1 nor that of the runs.
        DataError: a log has no update.
    """
    files = [file for run in runs for file in _logs_of(Path(run))]
    places = [file.resolve() for file in files]
    for file, place in zip(files, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{file} is named twice; name each run once")
    sizes = list(batch_sizes or [0])
    if len(sizes) not in (1, len(files)):
        raise ConfigError(
            f"effective_batch_size={','.join(map(str, sizes))} gives {len(sizes)} "
            f"numbers for {len(files)} runs; give one for all, or one for each"
        )
    if len(sizes) == 1:
        sizes *= len(files)
    return [
        make_curve(label, read_log(file), size or None)
        for label, file, size in zip(labels_of(files), files, sizes, strict=True)
    ]


def _logs_of(run: Path) -> list[Path]:
    if not run.is_dir():
        if not run.exists():
            raise ConfigError(
                f"{run} does not exist; name a run directory, or a JSONL file of records"
            )
        return [run]
    if (run / METRICS).is_file():
        return [run / METRICS]
    inside = [path.parent for path in run.glob(f"*/{METRICS}") if path.is_file()]
    inside.sort(key=lambda folder: _in_order(folder.name))
    if not inside:
        raise ConfigError(
            f"{run} is a folder without {METRICS}, and so are those in it; name a run directory, "
            "or a JSONL file of records"
        )
    return [folder / METRICS for folder in inside]


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts `k2` before `k16`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in parts]


def labels_of(files: Sequence[Path]) -> list[str]:
    """A short name for each log: of its run directory or file, with as many folders before it as
    tell it from the others."""
    parts = []
    for file in files:
        path = file.absolute()
        path = path.parent if path.name == METRICS else path.with_suffix("")
        parts.append(path.parts[1:] or ("run",))
    labels = []
    for mine in parts:
        depth = 1
        while depth < len(mine) and sum(one[-depth:] == mine[-depth:] for one in parts) > 1:
            depth += 1
        labels.append(printable("/".join(mine[-depth:])))
    # Two names may differ in what cannot be printed, or in the end of the file's name.
    return [
        f"{label} ({number})" if labels.count(label) > 1 else label
        for number, label in enumerate(labels, start=1)
    ]


def printable(text: str) -> str:
    """Untrusted text for one line of a terminal or a picture: no control characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def make_curve(label: str, log: Log, batch_size: int | None = None) -> Curve:
    """Place the updates of a log on the axes.

    Records that are missing between two others count as updates like the later one, so a log that
    writes every tenth update has the same axes as one that writes all.

    Args:
        batch_size: samples per update, if the log does not tell.
    """
    step = log.step
    gap = np.diff(step, prepend=0)
    gap[0] = max(int(step[0]), 1)
    axes = {"updates": step + (1 - min(int(step[0]), 1))}  # some count from 0
    notes = []
    if (left_out := log.describe_left_out()) != "":
        notes.append(f"left out, {left_out}")
    if log.restarts:
        notes.append(
            f"the log goes back to an earlier step, to {log.restarts[0]:,}"
            f"{f' and {len(log.restarts) - 1} times more' if len(log.restarts) > 1 else ''}; the "
            "later records count"
        )
    every = int(np.median(gap[1:])) if len(step) > 2 else 1
    if every > 1:
        notes.append(
            f"a record every {every} updates; if its loss is a mean over them, "
            "its variance is that of a larger batch"
        )
    samples = _samples(log, gap, batch_size)
    if samples is not None:
        axes["samples"] = samples
    seconds = _seconds(log, gap)
    if seconds is not None:
        axes["seconds"] = seconds
    folder = log.path.parent if log.path.name == METRICS else None
    split, batch = _split(log)
    return Curve(label, log, folder, axes, split, batch or batch_size, tuple(notes), every)


def _samples(log: Log, gap: np.ndarray, batch_size: int | None) -> np.ndarray | None:
    per_update = log.column("effective_batch_size")
    if per_update is None:
        told = log.column("consumed_samples")
        if told is not None and _is_rising(told):
            return told
        return None if batch_size is None else np.cumsum(gap * float(batch_size))
    return np.cumsum(_filled(per_update) * gap)


def _seconds(log: Log, gap: np.ndarray) -> np.ndarray | None:
    per_update = log.column("step_time_sec")
    if per_update is not None:
        return np.cumsum(_filled(per_update) * gap + log.lost_sec)
    for name in ("_runtime", "_timestamp", "timestamp"):
        clock = log.column(name)
        if clock is not None and _is_rising(clock):
            return clock if name == "_runtime" else clock - clock[0]
    return None


def _filled(numbers: np.ndarray) -> np.ndarray:
    """Without gaps and negative numbers: the median stands for them."""
    known = np.isfinite(numbers) & (numbers >= 0)
    middle = float(np.median(numbers[known])) if known.any() else 0.0
    return np.where(known, numbers, middle)


def _is_rising(numbers: np.ndarray) -> bool:
    return bool(np.isfinite(numbers).all() and (np.diff(numbers) >= 0).all())


def _split(log: Log) -> tuple[str, int | None]:
    """How most updates were made; tails and split micro-batches are the exceptions."""
    names = ("physical_batch_size", "gradient_accumulation_steps", "world_size")
    columns = [log.columns.get(name) for name in (*names, "effective_batch_size")]
    batches = columns[3]
    if batches is None or not np.isfinite(batches).any():
        return "", None
    [(batch, _)] = Counter(batches[np.isfinite(batches)].tolist()).most_common(1)
    whole = batches == batch
    b, k, w = (
        _most_common(column[whole]) if column is not None else None for column in columns[:3]
    )
    batch = int(batch)
    if k is None or w is None:
        return f"effective batch {batch}", batch
    if b is not None and b * k * w == batch:
        return f"B {b} x K {k} x W {w} = {batch}", batch
    within = "" if b is None else f"B {b}, "
    return f"{within}K mostly {k} x W {w}, effective batch {batch}", batch


def _most_common(numbers: np.ndarray) -> int | None:
    finite = numbers[np.isfinite(numbers)]
    return int(Counter(finite.tolist()).most_common(1)[0][0]) if len(finite) else None


def check_axis(curves: Sequence[Curve], axis: str) -> None:
    """Raise a DataError if a run's log does not tell where it is on an axis."""
    for curve in curves:
        if axis not in curve.axes:
            needed = {"samples": "effective_batch_size", "seconds": "step_time_sec"}[axis]
            raise DataError(
                f"{curve.log.path} has no {needed}, so its {axis} are not known; choose the axis "
                "updates"
            )
