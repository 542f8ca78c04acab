"""`accum-trainer report`."""

from __future__ import annotations

from pathlib import Path

import click

from accum_trainer.cli.compare import (
    axis_option,
    baseline_option,
    batch_size_option,
    runs_argument,
)
from accum_trainer.cli.file_completion import path_option
from accum_trainer.cli.output_file import check_output_file, check_replaceable
from accum_trainer.errors import ConfigError

_NAME = "report.html"


@click.command(
    "report",
    epilog="Examples: accum-trainer report runs/first   |   "
    "accum-trainer report runs/k1 runs/k16 -o k1-k16.html",
)
@runs_argument
@path_option(
    "-o",
    "--output",
    metavar="FILE",
    help=f"The page. Default: {_NAME} in the run directory; required for anything else.",
)
@baseline_option
@axis_option
@batch_size_option
def command(
    runs: tuple[str, ...],
    output: str | None,
    baseline: str | None,
    axis: str,
    batch_sizes: list[int] | None,
) -> None:
    """Write one HTML file about a run, or about several runs and their comparison.

    It opens without a server and without a network, and holds no scripts. RUN is what `compare`
    takes; a run may still train.
    """
    from accum_trainer.runs.compare import compare
    from accum_trainer.runs.report import BEGINNING, write_report

    path = _place(runs, output)
    check_output_file("output", path, runs)
    check_replaceable("output", path, BEGINNING.encode(), "report")
    write_report(compare(runs, baseline, axis, batch_sizes), path)
    click.echo(f"report: {path}")


def _place(runs: tuple[str, ...], output: str | None) -> Path:
    from accum_trainer.train.run_folder import METRICS

    if output is not None:
        return Path(output)
    if len(runs) == 1 and (Path(runs[0]) / METRICS).is_file():
        return Path(runs[0]) / _NAME
    raise ConfigError("name the page with -o FILE.html; only that of one run directory has a place")
