"""`accum-trainer verify`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accum_trainer.cli.options import SectionedCommand, config_options, source_options
from accum_trainer.config import compose
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
@source_options
@click.option(
    "--windows",
    default=3,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Whole windows to compare, in low precision at least 4; the epoch's tail comes on top. "
    "Without --loop.",
)
@click.option(
    "--loop",
    "loop_spec",
    metavar="FILE.py:FUNCTION",
    help="Check your own step on plain Accelerate instead: function(accelerator, model, optimizer, "
    "scheduler, batches).",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Also write the report as JSON; nothing else is written.",
)
@config_options()
def command(
    config_file: str | None,
    settings: tuple[str, ...],
    windows: int,
    loop_spec: str | None,
    json_file: str | None,
    **given: Any,
) -> None:
    """Prove that K micro-batches on W processes give the one-big-batch update, on your model, data
    and engine.

    Takes the options of `train` and runs the same loop on a few windows; each update is compared
    with one big batch in float64. With --loop, checks a training step of your own and says which
    fault it has. Exits with 0 if all checks pass, 1 if one fails, 2 on wrong input. On several
    processes: `accelerate launch --multi_gpu --num_processes N -m accum_trainer.verify`.
    """
    named = {name: value for name, value in given.items() if value is not None}
    composed = compose(named, settings, config_file, os.environ)
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise ConfigError(
            f"json={json_file} cannot be written: there is no folder {Path(json_file).parent}"
        )
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


def _verify(config: Any, windows: int, loop_spec: str | None) -> Report:
    if loop_spec is None:
        from accum_trainer.train.setup import assemble
        from accum_trainer.verify.training import Subject, verify

        return verify(Subject.of(assemble(config)), windows)
    from accum_trainer.verify.loop import load_loop, verify_loop_of

    return verify_loop_of(config, load_loop(loop_spec), int(os.environ.get("WORLD_SIZE", "1")))


def _show(report: Report) -> None:
    """A table on a terminal, aligned text elsewhere; then what belongs below it, and the
    verdict."""
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
