"""`accum-trainer checkpoint`."""

from __future__ import annotations

from pathlib import Path

import click

from accum_trainer.cli.file_completion import path_argument, path_option


@click.group("checkpoint")
def command() -> None:
    """Look into a run's checkpoints."""


@command.command(
    "export", epilog="Example: accum-trainer checkpoint export runs/first -o runs/first-so-far"
)
@path_argument("source", metavar="RUN|CHECKPOINT")
@path_option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="A new folder for the model.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the model run Python code that comes with it; needed even if the run had it.",
)
def export(source: str, output: str, trust_remote_code: bool) -> None:
    """Write a checkpoint's model as `from_pretrained` loads it; with LoRA, the adapter.

    RUN is a run directory, whose newest whole checkpoint is taken. The run may still be training.
    """
    from accum_trainer.runs.export import export as write

    checkpoint = write(Path(source), Path(output), trust_remote_code)
    click.echo(f"{output}: the model of {checkpoint}")
