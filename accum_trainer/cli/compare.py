"""`accum-trainer compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accum_trainer.cli.file_completion import path_argument, path_option
from accum_trainer.cli.options import whole_numbers
from accum_trainer.cli.output_file import check_output_file, check_replaceable
from accum_trainer.errors import ConfigError

if TYPE_CHECKING:
    from accum_trainer.runs.compare import Comparison

_PICTURE = "comparison.png"
_BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
_JSON_BEGINS = b'{\n "accum_trainer": "comparison"'
# Columns of a terminal for the figures' names, and for a run.
_NAMES_WIDTH, _RUN_WIDTH = 30, 22

runs_argument = path_argument("runs", metavar="RUN...", nargs=-1, required=True)
baseline_option = click.option(
    "--baseline",
    metavar="NAME|N",
    help="Run that the others are measured against, by its name in the table or its place from 1. "
    "Default: the one of the smallest effective batch.",
)
axis_option = click.option(
    "--axis",
    type=click.Choice(["auto", "updates", "samples"]),
    default="auto",
    show_default=True,
    help="Compare variances up to the last update, or sample, that all runs reach; auto: samples, "
    "if every run made 30 updates on those that all have seen.",
)


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> list[int] | None:
    return None if text is None else whole_numbers("effective_batch_size", text, "32 or 2,32")


batch_size_option = click.option(
    "--effective-batch-size",
    "batch_sizes",
    metavar="N[,N...]",
    callback=_numbers,
    help="Samples per update of logs that do not tell: one number for all, or one for each run.",
)


@click.command(
    "compare",
    epilog="Examples: accum-trainer compare runs/k1 runs/k16   |   accum-trainer compare "
    "runs/sweep --baseline 2   |   accum-trainer compare ours.jsonl theirs.jsonl "
    "--effective-batch-size 32",
)
@runs_argument
@path_option(
    "-o",
    "--output",
    metavar="FILE",
    help=f"The picture, .png, .svg or .pdf.  [default: {_PICTURE}]",
)
@click.option("--no-picture", is_flag=True, help="Print the table only.")
@path_option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Also write all figures as JSON.",
)
@baseline_option
@axis_option
@batch_size_option
def command(
    runs: tuple[str, ...],
    output: str | None,
    no_picture: bool,
    json_file: str | None,
    baseline: str | None,
    axis: str,
    batch_sizes: list[int] | None,
) -> None:
    """Compare the loss curves of runs in a table and a picture: at equal updates, samples and time,
    and how noisy they are.

    RUN is a run directory, which may still train, a folder of run directories, or a JSONL file of
    any trainer whose records have `step` and `loss`. The variance is measured around each curve's
    own trend, so its slope does not count; the last lines say whether it is at least 50 % lower
    than the baseline's.
    """
    picture = None if no_picture else Path(output or _PICTURE)
    _check_files(runs, picture, output, Path(json_file) if json_file else None)
    from accum_trainer.runs.compare import compare

    found = compare(runs, baseline, axis, batch_sizes)
    show(found)
    if picture is not None:
        from accum_trainer.runs.comparison_picture import draw_comparison

        draw_comparison(found, picture)
        click.echo(f"picture: {picture}")
    if json_file is not None:
        from accum_trainer.train import durable

        durable.write_text(Path(json_file), json.dumps(found.as_json(), indent=1) + "\n")
        click.echo(f"figures: {json_file}")


def _check_files(
    runs: tuple[str, ...], picture: Path | None, asked: str | None, json_file: Path | None
) -> None:
    if picture is None and asked is not None:
        raise ConfigError(f"output={asked} is the picture, and no_picture asks for none; give one")
    if picture is not None:
        kind = picture.suffix.lower()
        if kind not in _BEGINNINGS:
            raise ConfigError(
                f"output={picture} is no name of a picture; let it end in {', '.join(_BEGINNINGS)}"
            )
        check_output_file("output", picture, runs)
        check_replaceable("output", picture, _BEGINNINGS[kind], f"{kind[1:].upper()} picture")
    if json_file is not None:
        if picture is not None and json_file.absolute() == picture.absolute():
            raise ConfigError(f"json={json_file} is the picture's name too; name another file")
        check_output_file("json", json_file, runs)
        check_replaceable("json", json_file, _JSON_BEGINS, "comparison")


def show(comparison: Comparison) -> None:
    """Print a column for each run, as many beside each other as the terminal holds; then what the
    figures mean and the verdicts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from accum_trainer.runs.figures import comparison_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=_NAMES_WIDTH + (_RUN_WIDTH + 40) * len(comparison.runs))
    names, rows = comparison_rows(comparison)
    at_once = max(1, (console.width - _NAMES_WIDTH) // _RUN_WIDTH)
    for first in range(0, len(names), at_once):
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for name in names[first : first + at_once]:
            table.add_column(Text(name), justify="right", overflow="fold")
        for title, cells in rows:
            table.add_row(title, *(Text(cell) for cell in cells[first : first + at_once]))
        console.print(table)
        click.echo()
    _show_notes(comparison)


def _show_notes(comparison: Comparison) -> None:
    lines: list[Any] = [
        f"variance: of the loss around its own trend, {comparison.describe_range()}",
    ]
    if len(comparison.runs) > 1:
        baseline = comparison.runs[comparison.baseline].curve.label
        lines.append(f"baseline: {baseline} ({comparison.baseline_reason})")
    for run in comparison.runs:
        lines += [f"note: {run.curve.label}: {note}" for note in run.curve.notes]
    for line in [*lines, *comparison.verdicts()]:
        click.echo(line)
