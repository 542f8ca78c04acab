"""Records as curves: read once, line by line as they come; smoothed and thinned for a chart."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kept of every record; other keys are shown of the last one only.
KEPT = ("step", "loss", "lr", "grad_norm", "eval_loss", "noise_scale")
_MOST_POINTS = 400
_LONGEST_LINE = 1 << 20
# Read at a time, within a few tenths of a second: a longer file is taken in over several.
_MOST_BYTES = 8_000_000
_TAIL_BYTES = 32_000
Numbers = list[float | None]


class RecordReader:
    """The records of a metrics.jsonl that may still grow, or be replaced by a longer or shorter
    one when its run continues.

    Attributes:
        columns: key -> one number per record, None where there is none.
        last: the last record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._offset, self._file = 0, 0
        self.columns: dict[str, Numbers] = {key: [] for key in KEPT}
        self.last: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def read(self) -> bool:
        """Take in what is new; whether there was anything."""
        try:
            stat = self._path.stat()
        except OSError:
            had = len(self) > 0
            self._clear()
            return had
        if stat.st_ino != self._file or stat.st_size < self._offset:
            self._clear()
            self._file = stat.st_ino
        if stat.st_size == self._offset:
            return False
        before, began = len(self), self._offset
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                record = _record(line)
                if record is not None:
                    for key, column in self.columns.items():
                        column.append(number(record.get(key)))
                    self.last = record
                if self._offset - began >= _MOST_BYTES:
                    break
        return len(self) != before

    def read_last(self) -> None:
        """Take in the last record only, whatever the length of the file."""
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for line in reversed(file.read().split(b"\n")[:-1]):
                record = _record(line)
                if record is not None:
                    self.last = record
                    return


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if len(line) <= _LONGEST_LINE else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or number(record.get("step")) is None:
        return None
    return record


def number(value: object) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def smoothed(values: Sequence[float | None], weight: float) -> Numbers:
    """Exponential moving average of weight `weight` on the past, without the bias of its beginning
    (Kingma and Ba 2014, arXiv:1412.6980, section 3)."""
    found: Numbers = []
    mean = norm = 0.0
    for value in values:
        if value is None:
            found.append(None)
            continue
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        found.append(mean / norm)
    return found


def points(
    steps: Sequence[float | None],
    values: Sequence[float | None],
    most: int = _MOST_POINTS,
    with_gaps: bool = False,
) -> list[list[float | None]]:
    """[step, value] of each number; of a long curve, at most `most` means of equal stretches.

    Args:
        with_gaps: [step, None] where there is no number, so that the line breaks off there.
    """
    known = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if step is not None and (with_gaps or value is not None)
    ]
    size = -(-len(known) // most) or 1
    found: list[list[float | None]] = []
    for first in range(0, len(known), size):
        stretch = known[first : first + size]
        numbers = [value for _, value in stretch if value is not None]
        mean = float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None
        found.append([stretch[-1][0], mean])
    return found
