"""`accum-trainer verify`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accum_trainer.cli.file_completion import path_option
from accum_trainer.cli.options import SectionedCommand, composed_options
from accum_trainer.cli.output_file import check_output_file
from accum_trainer.config import Composed, TrainConfig
from accum_trainer.errors import ConfigError

if TYPE_CHECKING:
    from accum_trainer.verify.report import Check, Report

_HEADER = ("check", "result", "error", "tolerance", "meaning")


@click.command(
    "verify",
    cls=SectionedCommand,
    epilog="Examples: accum-trainer verify --batch-size 4 --gradient-accumulation-steps 8   |   "
    "accum-trainer verify --loop my_loop.py:update --gradient-accumulation-steps 4",
)
@click.option(
    "--windows",
    default=3,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Whole windows to compare, in low precision at least 4, plus the epoch's tail. "
    "Without --loop.",
)
@path_option(
    "--loop",
    "loop_spec",
    metavar="FILE.py:FUNCTION",
    help="Check your own step on plain Accelerate instead: function(accelerator, model, optimizer, "
    "scheduler, batches).",
)
@path_option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Also write the report as JSON; nothing else is written.",
)
@composed_options()
def command(composed: Composed, windows: int, loop_spec: str | None, json_file: str | None) -> None:
    """Prove that K micro-batches on W processes give the one-big-batch update, on your model, data
    and engine.

    Takes the options of `train` and runs the same loop on a few windows; each update is compared
    with one big batch in float64. With --loop, checks your own training step and names its fault.
    Exits with 0 if all checks pass, 1 if one fails, 2 on wrong input. On several
    processes: `accelerate launch --multi_gpu --num_processes N -m accum_trainer.verify`.
    """
    if json_file is not None:
        check_output_file("json", Path(json_file))  # before the minutes it takes
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        for line in composed.overridden:
            click.echo(f"note: {line}", err=True)
    report = _verify(composed.config, windows, loop_spec)
    if is_main:
        if json_file is not None:
            Path(json_file).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        _show(report)
    sys.exit(0 if report.passed else 1)


def _verify(config: TrainConfig, windows: int, loop_spec: str | None) -> Report:
    if loop_spec is None:
        from accum_trainer.train.setup import assemble
        from accum_trainer.verify.training import Subject, verify

        return verify(Subject.of(assemble(config)), windows)
    from accum_trainer.engine.lost_processes import launched_processes
    from accum_trainer.verify.loop import verify_loop_of
    from accum_trainer.verify.loop_file import load_loop

    loop, processes = load_loop(loop_spec), launched_processes()
    in_force = "single" if processes == 1 else "ddp"
    if config.engine not in (None, in_force):
        raise ConfigError(
            f"engine={config.engine}, but a loop on plain Accelerate is checked on {in_force} "
            "here; leave engine out"
        )
    return verify_loop_of(config, loop, processes)


def _show(report: Report) -> None:
    """A table on a terminal, aligned text elsewhere; then the checks' details and the verdict."""
    if sys.stdout.isatty():
        _show_table(report)
    else:
        _show_text(report)
    for check in report.checks:
        if check.details:
            click.echo(f"\n{check.name}: {check.meaning}")
            for line in check.details:
                click.echo(f"  {line}")
    failed = sum(check.result == "FAIL" for check in report.checks)
    passed = sum(check.result == "PASS" for check in report.checks)
    click.echo(f"\n{'FAIL' if failed else 'PASS'}: {passed} checks passed, {failed} failed")


def _show_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in _HEADER:
        table.add_column(
            name, overflow="fold", justify="right" if name in ("error", "tolerance") else "left"
        )
    colours = {"PASS": "green", "FAIL": "bold red", "INFO": "dim"}
    for check in report.checks:
        name, result, *rest = _cells(check)
        table.add_row(name, f"[{colours[result]}]{result}[/]", *rest)
    Console().print(table)


def _show_text(report: Report) -> None:
    rows = [_HEADER, *map(_cells, report.checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))


def _cells(check: Check) -> tuple[str, str, str, str, str]:
    error, tolerance = ("" if x is None else f"{x:.1e}" for x in (check.error, check.tolerance))
    return check.name, check.result, error, tolerance, check.meaning
