"""Rows that were left out because they cannot be read or trained on: their number, and what was
wrong with the first. Knows neither files of rows nor formats."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Skipped:
    """A count that grows while rows are read."""

    count: int = 0
    first: str = ""

    def add(self, problem: str) -> None:
        self.count += 1
        self.first = self.first or problem

    def plus(self, other: Skipped) -> Skipped:
        return Skipped(self.count + other.count, self.first or other.first)

    def write(self, path: Path) -> None:
        """Write it beside a cached table, which does not hold the rows any more."""
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Skipped | None:
        """What `write` wrote; None if it is missing or damaged."""
        try:
            held = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return held if isinstance(held.count, int) and isinstance(held.first, str) else None
