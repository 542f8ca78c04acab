"""What a part is given and gives back, and the process that it runs in.

    python -m benchmarks.gpu.part NAME SETTING-AS-JSON OUT.json

A part is a function of a `Setting` that returns a `Result`. It knows nothing of other parts, of
limits or of the report.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import json
import math
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# name -> (module, function, most seconds on a GPU, what it shows)
PARTS: dict[str, tuple[str, str, int, str]] = {
    "contract": (
        "contract",
        "contract",
        150,
        "Updates against one float64 big batch, by the tests' own assertions",
    ),
    "precision": ("training", "precision", 120, "20 updates in 16 bits against float32"),
    "memory": ("memory", "memory", 120, "Running out of memory; --batch-size auto"),
    "packing": ("packed", "packing", 100, "Gradients of packed samples against padded float64"),
    "flex": ("packed", "flex", 150, "The same under flex_attention, which is compiled"),
    "compile": ("training", "compiled", 150, "--compile against uncompiled"),
    "sharded": ("contract", "sharded", 200, "ZeRO and FSDP2 with one process"),
    "waits": ("waits", "waits", 80, "How often the host waits for the device in a window of K=8"),
    "footprint": ("footprints", "footprint", 150, "Estimated memory against allocated memory"),
    "throughput": (
        "throughput",
        "throughput",
        420,
        "Against transformers.Trainer on the same ragged rows",
    ),
}


@dataclass(frozen=True)
class Setting:
    """How a part is to run.

    Attributes:
        device: `cuda` or `cpu`.
        small: in seconds on a CPU.
        folder: for a part's own files.
        limit: seconds that the part has.
    """

    device: str
    small: bool
    folder: str
    limit: float = math.inf

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def patience(self) -> float:
        """Times the limits: tests share their cores with others."""
        return 4.0 if self.small else 1.0

    def place(self, name: str) -> Path:
        """A folder of this name, made anew or as it was."""
        found = Path(self.folder) / name
        found.mkdir(parents=True, exist_ok=True)
        return found


@dataclass
class Table:
    header: list[str]
    rows: list[list[Any]]


@dataclass
class Check:
    """One statement that can be false: `words` hold the numbers."""

    name: str
    passed: bool
    words: str


@dataclass
class Result:
    """What a part found.

    Attributes:
        table: one row per thing that was measured.
        checks: what must hold; a part whose checks fail has a result all the same.
        notes: what a reader must know: sizes, precision, what was left out.
    """

    table: Table
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, passed: bool, words: str) -> None:
        self.checks.append(Check(name, bool(passed), words))

    def needs_gpu(self, setting: Setting, what: str) -> None:
        """Say on a CPU what was left out there."""
        if setting.cpu:
            self.notes.append(f"{what} needs a GPU: not run here.")

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A check that `value` is at most `limit`, and a number."""
        self.check(name, value <= limit, f"{value:.3g}, at most {limit:.3g}")


def one_line(error: BaseException) -> str:
    """Type and first line, for a cell of a table."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def last_words(text: str, lines: int = 12) -> str:
    """The end of what a process wrote."""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])


def main(name: str, setting: str, out: str) -> None:
    faulthandler.register(signal.SIGTERM, chain=True)  # its last words are where it was
    module, function, *_ = PARTS[name]
    run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    result: Result = run(Setting(**json.loads(setting)))
    partial = Path(f"{out}.partial")
    partial.write_text(json.dumps(dataclasses.asdict(result)))
    partial.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
