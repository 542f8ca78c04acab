"""`accum-trainer requeue`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from accum_trainer.cli.train import parse
from accum_trainer.errors import ConfigError


@click.command(
    "requeue",
    epilog="Example: accum-trainer requeue $? -- --output-dir runs/first --steps 100",
)
@click.option(
    "--batch-start", metavar="TEXT", help="What `launch --batch-start` was given on each node."
)
@click.option(
    "--max-without-progress",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="How often in a row to go back into the queue without a new update.",
)
@click.argument("status", type=int)
@click.argument("train", nargs=-1, type=click.UNPROCESSED, metavar="-- [TRAIN-ARGS]...")
def command(
    batch_start: str | None, max_without_progress: int, status: int, train: tuple[str, ...]
) -> None:
    """Say whether a batch job goes back into the queue: status 75 if so.

    Batch scripts call it after the training, with the STATUS of that and the arguments of `train`.
    What the run directory says counts: the batch system's status may be another node's, or that of
    its own SIGKILL. Ends with 0 if the run is done, 75 if it was stopped and is to continue, 2 if
    it was refused, 1 or STATUS if it failed.
    """
    from accum_trainer.runs.requeue import decide

    folder = parse(train).config.output_dir
    if folder is None:
        raise ConfigError("requeue looks into the run directory; give its --output-dir after --")
    if Path(folder).is_file():
        raise ConfigError(
            f"output_dir={folder} is a file, not a run directory; give that of the training"
        )
    verdict = decide(Path(folder), status, batch_start, max_without_progress)
    click.echo(f"{folder}: {verdict.reason}", err=True)
    sys.exit(verdict.status)
