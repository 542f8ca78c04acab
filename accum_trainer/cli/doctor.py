"""`accum-trainer doctor`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accum_trainer.cli.file_completion import path_option

if TYPE_CHECKING:
    from accum_trainer.doctor.report import Report

NEEDS = (
    *("gpu", "bf16", "flash_attention_2", "compile", "deepspeed", "hydra", "several processes"),
    *("several nodes", "tensorboard", "trackio", "wandb", "mlflow"),
)
_COLOURS = {"ok": "green", "limit": "yellow", "fail": "red"}


@click.command(
    "doctor",
    epilog="Example: accum-trainer doctor --output-dir runs --need deepspeed --need bf16",
)
@path_option(
    "--output-dir",
    default="runs",
    show_default=True,
    metavar="DIR",
    help="Where the runs are to live.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Where the processes are to meet. Default: the launchers', which may be taken.",
)
@click.option(
    "--need",
    "needs",
    multiple=True,
    type=click.Choice(NEEDS),
    metavar="NAME",
    help=f"What must work beside plain training; may be repeated: {', '.join(NEEDS)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(output_dir: str, port: int | None, needs: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine offers, what would not work here, and the command that mends it.

    Tries the real things: compiles, writes, binds the port, runs each attention kernel and one
    update. Exits with 0 if training can run, with all that --need names; with 1 if not.
    """
    try:
        from accum_trainer.doctor.checks import examine
    except (ImportError, OSError) as error:  # a package, or a library of the system
        raise click.ClickException(
            f"nothing can be checked, because an import fails: {error}; install it again (pip "
            f"install --force-reinstall {getattr(error, 'name', None) or 'torch'})"
        ) from error
    report = examine(Path(output_dir), port, needs)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report)
    sys.exit(0 if report.can_train else 1)


def _show(report: Report) -> None:
    width = max(len(found.name) for found in report.findings)
    columns = max(60, shutil.get_terminal_size((100, 24)).columns)
    indent = " " * (9 + width)
    for found in report.findings:
        state = click.style(found.state.ljust(5), fg=_COLOURS[found.state])
        text = click.wrap_text(found.says, columns - 1, " " * (7 + width), indent)
        click.echo(f"{state}  {found.name.ljust(width)}  {text.strip()}")
        if found.remedy and found.state != "ok":
            click.echo(f"{indent}-> {found.remedy}")
    failed, limits = report.named("fail"), report.named("limit")
    if failed:
        click.echo(f"\ntraining would not run: {', '.join(failed)}")
        return
    lacks = {lack for found in report.findings if found.state == "limit" for lack in found.lacks}
    without = f", but not: {', '.join(sorted(lacks))}" if limits else ""
    click.echo(f"\ntraining can run here{without}")
