"""Records as curves: read once, line by line as they come; smoothed and thinned for a chart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kept of every record; other keys are shown of the last one only.
KEPT = ("step", "loss", "lr", "grad_norm", "eval_loss", "noise_scale")
_MOST_POINTS = 400
_LONGEST_LINE = 1 << 20
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
        before = len(self)
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                self._add(line)
        return len(self) != before

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line) if len(line) <= _LONGEST_LINE else None
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict) or number(record.get("step")) is None:
            return
        for key, column in self.columns.items():
            column.append(number(record.get(key)))
        self.last = record


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
    steps: Sequence[float | None], values: Sequence[float | None], most: int = _MOST_POINTS
) -> list[list[float]]:
    """[step, value] of each number; of a long curve, at most `most` means of equal stretches."""
    known = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if step is not None and value is not None
    ]
    size = -(-len(known) // most) or 1
    found = []
    for first in range(0, len(known), size):
        stretch = known[first : first + size]
        value = sum(value for _, value in stretch) / len(stretch)
        found.append([stretch[-1][0], float(f"{value:.6g}")])
    return found
