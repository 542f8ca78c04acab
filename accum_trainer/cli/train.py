"""`accum-trainer train`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from accum_trainer.cli.options import SectionedCommand, composed_options
from accum_trainer.config import Composed, compose
from accum_trainer.errors import ConfigError
from accum_trainer.launch.signals import STOPPED_AND_SAVED

if TYPE_CHECKING:
    from accum_trainer.train.loop import Run
    from accum_trainer.train.progress import Progress
    from accum_trainer.train.records import Record


@click.command(
    "train",
    cls=SectionedCommand,
    epilog="Example: accum-trainer train --dataset-file rows.jsonl --batch-size 4 "
    "--gradient-accumulation-steps 8 --steps 100 --output-dir runs/first",
)
@composed_options()
def command(composed: Composed) -> None:
    """Train with an exact effective batch: the update never depends on how the batch is cut or
    spread.

    Without a data file, trains a small model on text that comes with Python. Options come from the
    command line, then from ACCUM_TRAINER_<OPTION> variables, then from --config. Run the same
    program on several processes with `accelerate launch --multi_gpu --num_processes N -m
    accum_trainer.train`.
    """
    if composed.config.parallel_independent:
        from accum_trainer.cli.independent import train_independent_runs

        sys.exit(train_independent_runs(composed))
    from accum_trainer.train.loop import Run

    run = Run(composed.config)
    if run.engine.is_main:
        for line in composed.overridden:
            click.echo(f"note: {line}", err=True)
        click.echo(run.describe(), err=True)
    if composed.config.dry_run:
        if run.engine.is_main:
            click.echo("dry run: nothing was trained and nothing written", err=True)
        return
    last = _show_progress(run)
    if run.stopped_by:  # it is saved: a signal that is sent again must not change the exit status
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    if not run.engine.is_main:
        sys.exit(STOPPED_AND_SAVED if run.stopped_by else 0)
    done = run.training.accumulator.num_updates
    if run.stopped_by:
        click.echo(run.describe_stop())
        _show_results(run)
        sys.exit(STOPPED_AND_SAVED)
    loss = (
        f", loss {last['loss']:.4f}"
        if last
        else " (the run was complete already; raise --steps or --epochs to go on)"
    )
    click.echo(f"done: {done} updates{loss}; {run.folder}")
    _show_results(run)


def _show_results(run: Run) -> None:
    if (advice := run.describe_noise()) is not None:
        click.echo(advice)
    if run.best is not None:
        click.echo(
            f"best evaluation: {run.best.eval_loss:.4f} after update {run.best.updates}; `accum-"
            f"trainer checkpoint export {run.folder / run.best.checkpoint} -o DIR` writes its model"
        )


def options_in(arguments: Sequence[str]) -> dict[str, Any]:
    """The options given by these arguments of `train`, as typed, `config_file` and `settings`
    included."""
    if {"-h", "--help"} & set(arguments):
        raise ConfigError(
            "--help is among the options of `train` here; run `accum-trainer train --help` instead"
        )
    params = command.make_context("train", list(arguments)).params
    return {name: value for name, value in params.items() if value not in (None, ())}


def parse(arguments: Sequence[str]) -> Composed:
    """The configuration that `train` would compose from these arguments and this environment.

    Raises:
        ConfigError, click.UsageError: as `train` raises them.
    """
    given = options_in(arguments)
    config_file, settings = given.pop("config_file", None), given.pop("settings", ())
    return compose(given, settings, config_file, os.environ)


def _show_progress(run: Run) -> Record | None:
    """Run the training and show how it goes: live on a terminal, else in lines; only the main
    process shows anything."""
    from accum_trainer.train.progress import Progress

    record, plan = None, run.training.schedule
    progress = Progress(plan.total_updates, run.training.accumulator.num_updates)
    with _display(run, progress) as show_last:
        for record in run.updates():
            progress.add(record)
            show_last()
    return record


@contextlib.contextmanager
def _display(run: Run, progress: Progress) -> Iterator[Callable[[], None]]:
    """A context in which `progress` is shown; gives what to call after each record."""
    if not run.engine.is_main:
        yield lambda: None
        return
    from accum_trainer.train.display import PlainLines, has_display, shown_live

    if has_display():
        clipped_at = run.config.max_grad_norm
        with shown_live(progress, run.describe_split(), clipped_at, lambda: run.stopped_by):
            yield lambda: None
        return
    lines = PlainLines(progress, run.config.log_every, partial(click.echo, err=True))
    yield lines.show_last
