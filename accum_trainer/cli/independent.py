"""Show `accum-trainer train --parallel-independent`: a live table of its runs, then a summary.

Reads each run's state and files; `runs.independent` starts and restarts them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from accum_trainer.config import Composed

if TYPE_CHECKING:
    from rich.table import Table

    from accum_trainer.runs.independent import IndependentRunner
    from accum_trainer.runs.independent_run import IndependentRun

_COLUMNS = ("run", "", "device", "state", "update", "loss", "tokens/s")


def train_independent_runs(composed: Composed) -> int:
    """Train the independent runs that the configuration asks for; returns the exit status."""
    from accum_trainer.runs.independent import IndependentRunner
    from accum_trainer.runs.independent_plan import plan_runs
    from accum_trainer.train.run_folder import new_run_folder

    config = composed.config
    folder = Path(config.output_dir) if config.output_dir else new_run_folder(config.model)
    runs, devices, on_gpu = plan_runs(config, folder)
    for line in composed.overridden:
        click.echo(f"note: {line}", err=True)
    kind = "GPUs" if on_gpu else "CPU slots"
    click.echo(
        f"{len(runs)} independent runs on {kind} {', '.join(devices)}; run directory: {folder}",
        err=True,
    )
    if config.dry_run:
        for run in runs:
            click.echo(f"{run.name}  {run.label}", err=True)
        click.echo("dry run: nothing was trained and nothing written", err=True)
        return 0
    runner = IndependentRunner(runs, devices, on_gpu, folder, config.max_restarts)
    status = show_while(runner)
    if status == 2:
        for reason in dict.fromkeys(run.reason for run in runs):
            click.echo(reason if reason.startswith("error") else f"error: {reason}", err=True)
        return status
    _show_end(runner, status)
    return status


def show_while(runner: IndependentRunner) -> int:
    """Run under a live table, or with a line for each change if there is no terminal."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if console.is_terminal:
        with Live(_table(runner.runs), console=console, refresh_per_second=4) as live:
            return runner.run(lambda: live.update(_table(runner.runs)))
    shown: dict[str, tuple[object, ...]] = {}

    def show_changes() -> None:
        for run in runner.runs:
            _, _, _, state, update, loss, speed = _row(run)
            record, total = run.last_record(), run.total_updates()
            tenth = record["step"] * 10 // total if record is not None and total else 0
            now = (run.state, run.restarts, tenth)
            if shown.get(run.name) != now:
                shown[run.name] = now
                progress = (
                    f"  update {update}  loss {loss}  {speed} tokens/s"
                    if record is not None
                    else ""
                )
                click.echo(f"{run.name}  {state}{progress}", err=True)

    return runner.run(show_changes)


def _table(runs: list[IndependentRun]) -> Table:
    from rich.table import Table

    table = Table()
    for name in _COLUMNS:
        table.add_column(
            name, justify="right" if name in ("update", "loss", "tokens/s") else "left"
        )
    for run in runs:
        table.add_row(*_row(run))
    return table


def _row(run: IndependentRun) -> tuple[str, str, str, str, str, str, str]:
    from accum_trainer.runs.independent_run import FAILED

    record, total = run.last_record(), run.total_updates()
    state = run.state + (f", restarted {run.restarts}x" if run.restarts else "")
    if run.state == FAILED:
        state += f": {run.reason}"
    update = f"{record['step']}/{total or '?'}" if record is not None else ""
    loss = f"{record['loss']:.4f}" if record is not None and record["loss"] is not None else ""
    speed = f"{record['tokens_per_sec']:,.0f}" if record is not None else ""
    return run.name, run.label, run.device or "", state, update, loss, speed


def _show_end(runner: IndependentRunner, status: int) -> None:
    from accum_trainer.runs.independent_run import DONE, FAILED, STOPPED

    runs, folder = runner.runs, runner.folder
    samples = sum((run.result() or {}).get("num_samples", 0) for run in runs)
    done = sum(run.state == DONE for run in runs)
    restarts = sum(run.restarts for run in runs)
    failed = [run for run in runs if run.state == FAILED]
    for run in failed:
        click.echo(f"{run.name} failed: {run.reason} (log: {run.log})", err=True)
    summary = (
        f"{done} of {len(runs)} runs done, {samples} samples trained, {restarts} restarts; {folder}"
    )
    if status == 0:
        if runner.is_sweep:
            best = runner.best()
            then = f"best: {best}" if best else ""
        else:
            then = f"`accum-trainer merge {folder}` averages their weights" if len(runs) > 1 else ""
        click.echo(f"done: {summary}" + (f"\n{then}" if then else ""))
    else:
        export = (
            f"; `accum-trainer checkpoint export {folder}/NAME -o DIR` writes the model so far of "
            "one that was stopped"
            if any(run.state == STOPPED for run in runs)
            else ""
        )
        click.echo(f"{summary}; the same command with --output-dir {folder} continues{export}")
