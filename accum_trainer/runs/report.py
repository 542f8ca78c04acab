"""A page of HTML about one run, or about several and their comparison: one file, without scripts,
that needs no server and no network.

The template escapes every text. The page's own policy forbids scripts and all that would be loaded,
so that text from a run directory could do nothing even if it were not escaped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from accum_trainer import __version__
from accum_trainer.runs.compare import Compared, Comparison
from accum_trainer.runs.comparison_picture import axis_svg, column_svg, variances_svg
from accum_trainer.runs.figures import comparison_rows
from accum_trainer.runs.run_facts import Facts, Rows, facts_of
from accum_trainer.train import durable
from accum_trainer.train.loss_picture import COLOURS

BEGINNING = "<!DOCTYPE html><!-- accum-trainer report -->\n"
# The same, for a dark page.
DARK_COLOURS = ("#58a6ff", "#ff8f4d", "#3fcf9a", "#e08cc9", "#e3b341", "#79c6f2")
AXIS_TITLES = {"updates": "by updates", "samples": "by samples", "seconds": "by time"}
# Other columns that are drawn.
_COLUMNS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "noise_scale": "noise scale, samples",
    "peak_gb": "peak memory, GB",
}


@dataclass(frozen=True)
class Picture:
    """One picture in two widths, as SVG elements."""

    title: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Section:
    """One run on the page."""

    run: Compared
    facts: Facts
    figures: Rows
    pictures: list[Picture]


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page about these runs to `path`, which is replaced whole."""
    durable.write_text(path, BEGINNING + page(comparison))


def page(comparison: Comparison) -> str:
    """The page as HTML, without its first line."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = (resources.files("accum_trainer.runs") / "report.html").read_text(encoding="utf-8")
    names, rows = comparison_rows(comparison)
    sections = [
        _section(number, run, [(title, cells[number]) for title, cells in rows])
        for number, run in enumerate(comparison.runs)
    ]
    rendered: str = environment.from_string(text).render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs compared",
        comparison=comparison,
        names=names,
        rows=rows,
        sections=sections,
        curves=[
            Picture(
                AXIS_TITLES[axis], *(axis_svg(comparison, axis, narrow) for narrow in (False, True))
            )
            for axis in AXIS_TITLES
            if any(axis in run.curve.axes for run in comparison.runs)
        ],
        variances=Picture("", *(variances_svg(comparison, narrow) for narrow in (False, True))),
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        svg=Markup,  # matplotlib has escaped its texts
    )
    return rendered


def _section(number: int, run: Compared, figures: Rows) -> Section:
    columns = [name for name in _COLUMNS if run.curve.log.column(name) is not None]
    pictures = [
        Picture(
            _COLUMNS[name],
            *(column_svg(number, run.curve, name, narrow) for narrow in (False, True)),
        )
        for name in columns
    ]
    return Section(run, facts_of(run.curve), figures, pictures)
