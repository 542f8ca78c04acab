"""Read a log of any trainer: a JSONL file whose records have `step` and `loss`.

A log may come from anyone, be large, damaged, or still be written. Each line is either one update,
or counted under the reason for which it is none. Knows no run directory and draws nothing.
"""

from __future__ import annotations

import bisect
import json
import math
import stat
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accum_trainer.errors import DataError

# The numbers that are kept of a record, all optional. docs/records.md describes them; the last four
# are other trainers' names.
COLUMNS = (
    *("loss", "lr", "grad_norm", "eval_loss", "effective_batch_size", "physical_batch_size"),
    *("gradient_accumulation_steps", "world_size", "num_tokens", "num_targets"),
    *("padding_efficiency", "step_time_sec", "data_wait_sec", "peak_gb", "oom_splits"),
    *("noise_scale", "noise_scale_low", "noise_scale_high", "mfu"),
    *("consumed_samples", "_runtime", "_timestamp", "timestamp"),
)
# A line beyond this is no record; its content is not held in memory.
_LONGEST_LINE = 1 << 20
# Beyond it no sum, square or axis is exact; a loss that large has diverged.
_LARGEST_NUMBER = 1e15
_LARGEST_STEP = 1 << 53  # float64 counts no further
# Windows without an update that are kept one by one; beyond that they are counted.
_MOST_KEPT = 1000


@dataclass
class Log:
    """The updates of a log, in order of `step`.

    Attributes:
        path: the file.
        step: of each update, strictly increasing, shape [updates].
        columns: name -> float64 numbers, shape [updates]; NaN where a record has none. Of
            `COLUMNS` those of which there is a number.
        evaluations: (step, evaluation loss) in order.
        skipped: (step, reason) of windows that gave no update, the first thousand.
        num_skipped: how many windows gave no update.
        lost_sec: seconds of such windows before each update, shape [updates].
        left_out: reason -> number of records that are no update of the curve.
        restarts: steps at which the log went back to an earlier step.
    """

    path: Path
    step: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    num_skipped: int = 0
    lost_sec: np.ndarray = field(default_factory=lambda: np.zeros(0))
    left_out: Counter[str] = field(default_factory=Counter)
    restarts: list[int] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray | None:
        """The numbers of one column; None if no record has any."""
        return self.columns.get(name)

    def describe_left_out(self) -> str:
        """`records without a loss: 3, ...`; "" if nothing was left out."""
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())


def read_log(path: Path) -> Log:
    """Read the updates of a log.

    A record is an update if `step` and `loss` are numbers up to 1e15 and `skipped` is not true. If
    `step` goes back, as in a run that continued from a checkpoint, the later records replace the
    earlier ones from that step on; of two records of one step the later holds. A last line without
    an end is taken if it is whole: the log may still be written.

    Takes about 200 bytes of memory for each update, whatever the records hold.

    Raises:
        DataError: the file cannot be read, or has no update.
    """
    reading = _Reading(Log(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is no file; name a run directory or a JSONL file of records")
        with open(path, "rb") as file:
            for line in _lines(file):
                reading.add(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return reading.finish()


def _lines(file: Any) -> Iterator[bytes | None]:
    """The lines of a file that are not blank; None for one that is too long to be a record."""
    while line := file.readline(_LONGEST_LINE):
        is_whole = len(line) < _LONGEST_LINE or line.endswith(b"\n")
        if is_whole:
            if line.strip():
                yield line
            continue
        while rest := file.readline(_LONGEST_LINE):
            if rest.endswith(b"\n"):
                break
        yield None


class _Reading:
    """A log while its lines are added."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._step = array("q")
        self._columns = {name: array("d") for name in COLUMNS}
        self._lost_sec, self._lost = array("d"), 0.0
        self._is_unfinished = False

    def add(self, line: bytes | None) -> None:
        record = _parsed(line) if line is not None else None
        if not isinstance(record, dict):
            # Whoever writes the log may be in the middle of its last line.
            self._is_unfinished = line is not None and not line.endswith(b"\n")
            if not self._is_unfinished:
                self._log.left_out["lines that are no JSON object"] += 1
            return
        step = _number(record, "step")
        if step is None or not step.is_integer() or abs(step) > _LARGEST_STEP:
            self._log.left_out["records without a whole number as step"] += 1
            return
        self._add_record(int(step), record)

    def _add_record(self, step: int, record: dict[str, Any]) -> None:
        log = self._log
        if record.get("skipped") is True:
            log.num_skipped += 1
            seconds = _kept(record, "step_time_sec")
            self._lost += seconds if seconds >= 0 else 0.0
            if len(log.skipped) < _MOST_KEPT:
                log.skipped.append((step, str(record.get("skip_reason", ""))[:100]))
            return
        evaluation = _number(record, "eval_loss")
        if evaluation is not None and abs(evaluation) <= _LARGEST_NUMBER:
            while log.evaluations and log.evaluations[-1][0] >= step:
                log.evaluations.pop()
            log.evaluations.append((step, evaluation))
        loss = _number(record, "loss")
        if loss is None:
            if evaluation is None:
                log.left_out["records without a loss"] += 1
            return
        if not abs(loss) <= _LARGEST_NUMBER:
            log.left_out["losses that are not finite or beyond 1e15"] += 1
            return
        if self._step and step <= self._step[-1]:
            self._go_back_to(step)
        self._step.append(step)
        self._lost_sec.append(self._lost)
        self._lost = 0.0
        for name, column in self._columns.items():
            column.append(_kept(record, name))

    def _go_back_to(self, step: int) -> None:
        if step < self._step[-1]:
            self._log.restarts.append(step)
            self._log.evaluations = [one for one in self._log.evaluations if one[0] <= step]
        else:
            self._log.left_out["records of a step that a later record has too"] += 1
        kept = bisect.bisect_left(self._step, step)
        del self._step[kept:]
        for column in (self._lost_sec, *self._columns.values()):
            del column[kept:]

    def finish(self) -> Log:
        log = self._log
        if not self._step:
            found = log.describe_left_out()
            if log.num_skipped:
                found += f"{', ' if found else ''}windows without an update: {log.num_skipped:,}"
            raise DataError(
                f"{log.path} has no update{f' ({found})' if found else ': it is empty'}; name a "
                "run directory, or a JSONL file whose records have numbers as step and loss"
            )
        log.step = np.array(self._step, np.int64)
        log.lost_sec = np.array(self._lost_sec)
        for name, column in self._columns.items():
            numbers = np.array(column, np.float64)
            if np.isfinite(numbers).any():
                log.columns[name] = numbers
        return log


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return None


def _kept(record: dict[str, Any], key: str) -> float:
    """A number that is kept; NaN stands for none."""
    value = _number(record, key)
    return value if value is not None and abs(value) <= _LARGEST_NUMBER else math.nan
