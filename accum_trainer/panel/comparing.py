"""A comparison of runs as a page shows it: the figures and pictures of `accum-trainer compare` and
`report`, by their code. Knows no page."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.panel.run_view import sendable
from accum_trainer.runs.compare import Comparison, compare
from accum_trainer.runs.comparison_picture import axis_svg, variances_svg
from accum_trainer.runs.figures import comparison_rows
from accum_trainer.runs.report import AXIS_TITLES

# matplotlib's settings are one for all threads.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Drawn:
    """A picture in two widths, as SVG elements whose texts are escaped."""

    title: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Compared:
    """What a page shows.

    Attributes:
        verdicts: (`yes`, `no`, `not certain`, or "" if not known; sentence) for each run but the
            baseline.
        variance: what the variances are of; baseline: which run they are measured against.
        names, rows: the table: its columns, and (title, a cell for each).
        curves: the losses, by each axis that there is; variances: as bars.
        notes: what a reader of the figures should know.
    """

    verdicts: list[tuple[str, str]]
    variance: str
    baseline: str
    names: list[str]
    rows: list[tuple[str, list[str]]]
    curves: list[Drawn]
    variances: Drawn
    notes: list[str]


def compared(runs: Sequence[Path]) -> Compared:
    """Compare the runs of these directories. Takes up to seconds: call it in a thread.

    Raises:
        ConfigError, DataError: as `runs.compare.compare` raises them.
    """
    with _ONE_AT_A_TIME:
        found = compare(runs)
        names, rows = comparison_rows(found)
        others = [run for place, run in enumerate(found.runs) if place != found.baseline]
        falls = [run.fall.verdict if run.fall else "" for run in others]
        return Compared(
            [*zip(falls, map(sendable, found.verdicts()), strict=True)],
            f"The variance is that of the loss around its own trend, {found.describe_range()}.",
            f"{names[found.baseline]} ({found.baseline_reason})",
            names,
            rows,
            [
                Drawn(title, *(axis_svg(found, axis, narrow) for narrow in (False, True)))
                for axis, title in AXIS_TITLES.items()
                if any(axis in run.curve.axes for run in found.runs)
            ],
            Drawn("variances", *(variances_svg(found, narrow) for narrow in (False, True))),
            _notes(found),
        )


def _notes(found: Comparison) -> list[str]:
    return [f"{run.curve.label}: {note}" for run in found.runs for note in run.curve.notes]
