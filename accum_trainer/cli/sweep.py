"""`accum-trainer sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accum_trainer.batch_plan import LR_SCALINGS
from accum_trainer.cli.file_completion import path_option
from accum_trainer.cli.options import whole_numbers
from accum_trainer.errors import ConfigError
from accum_trainer.runs.sweep_verdict import TOLERANCE

if TYPE_CHECKING:
    from accum_trainer.runs.sweep import Sweep

_SCALINGS = {
    "none": "the same for every batch",
    "sqrt": "times the square root of the batch's ratio, as for Adam (Malladi et al. 2022, "
    "arXiv:2205.10287)",
    "linear": "times the batch's ratio, as for SGD (Goyal et al. 2017, arXiv:1706.02677)",
}


@click.command(
    "sweep",
    epilog="Example: accum-trainer sweep --global-batch-size 16,32,64 --from "
    "runs/first/checkpoints/step-00000500",
)
@click.option(
    "--global-batch-size",
    "sizes",
    required=True,
    metavar="N,N,...",
    help="The effective batches to compare.",
)
@path_option(
    "--from",
    "source",
    required=True,
    metavar="RUN|CHECKPOINT",
    help="The run whose newest checkpoint the branches begin from, or one of its checkpoints.",
)
@path_option(
    "-o",
    "--output",
    metavar="DIR",
    help="Folder of the sweep. Default: RUN-sweep, beside the run.",
)
@click.option(
    "--samples",
    type=int,
    metavar="N",
    help="Samples that each branch trains on, rounded up so that all end together. Default: 64 "
    "updates of the largest batch.",
)
@click.option(
    "--lr",
    type=float,
    metavar="X",
    help="The learning rate at the run's own batch. Default: its rate at the checkpoint.",
)
@click.option(
    "--lr-scaling",
    type=click.Choice(LR_SCALINGS),
    default="sqrt",
    show_default=True,
    help="How the learning rate follows the batch.",
)
@click.option(
    "--tolerance",
    type=float,
    default=TOLERANCE,
    show_default=True,
    metavar="X",
    help="Loss per target that counts as nothing.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="How often a branch that crashes is restarted from its checkpoint.",
)
@click.option("--dry-run", is_flag=True, help="Print the branches, train nothing, write nothing.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the model run Python code that comes with it; needed even if the run had it.",
)
def command(
    sizes: str,
    source: str,
    output: str | None,
    samples: int | None,
    lr: float | None,
    lr_scaling: str,
    tolerance: float,
    max_restarts: int,
    dry_run: bool,
    trust_remote_code: bool,
) -> None:
    """Find the largest effective batch that loses nothing per sample, by training.

    Each batch gets a branch of the run: a new run from the checkpoint's weights and optimizer
    state, at a constant learning rate, on the same samples in the same order. They train one after
    another on one device; the same command continues a sweep that was stopped. A noise scale only
    estimates what this measures.
    """
    from accum_trainer.runs import sweep as sweeps

    if samples is not None and samples < 1:
        raise ConfigError(f"samples={samples} is below 1; give the samples that each branch sees")
    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigError(f"lr={lr} must be above 0")
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance={tolerance} must be 0 or more")
    sweep = sweeps.plan_sweep(
        Path(source),
        whole_numbers("global_batch_size", sizes, "16,32,64"),
        output=Path(output) if output else None,
        samples=samples,
        lr=lr,
        lr_scaling=lr_scaling,
        trust_remote_code=trust_remote_code,
    )
    click.echo("\n".join(_described(sweep)), err=True)
    if dry_run:
        click.echo("dry run: nothing was trained and nothing written", err=True)
        return
    status = _train(sweep, max_restarts)
    if status:
        sys.exit(status)
    verdict = sweeps.conclude(sweep, tolerance)
    if verdict is None:
        click.echo(
            f"too few updates to compare in {sweep.samples} samples; give more --samples and "
            "another --output"
        )
        return
    click.echo("\n".join(verdict.describe()))
    click.echo(
        f"+- is the 95 % margin of paired differences over {verdict.num_blocks} blocks of about "
        f"{verdict.block} samples, the second half of each branch; up to {tolerance:g} counts as "
        f"nothing; {sweep.folder}"
    )


def _described(sweep: Sweep) -> list[str]:
    lines = [
        f"{len(sweep.branches)} branches of {sweep.checkpoint}, {sweep.samples} samples each; run "
        f"directory: {sweep.folder}",
        f"learning rate {sweep.lr:g} at B_eff {sweep.base_batch_size}, constant; "
        f"{sweep.lr_scaling}: {_SCALINGS[sweep.lr_scaling]}. Momentum and other options stay",
    ]
    for size, config in sweep.branches.items():
        lines.append(f"B_eff {size}: {config.steps} updates, lr {config.lr:.3g}")
    return lines


def _train(sweep: Sweep, max_restarts: int) -> int:
    """Train the branches; the exit status, 0 if all are done."""
    import torch

    from accum_trainer.cli.independent import show_while
    from accum_trainer.runs.independent import IndependentRunner
    from accum_trainer.runs.sweep import begin, remove_beginning

    runs = sweep.runs()
    begin(sweep)
    on_gpu = torch.cuda.is_available() and not runs[0].config.cpu
    status = show_while(IndependentRunner(runs, ["0"], on_gpu, sweep.folder, max_restarts))
    for reason in dict.fromkeys(run.reason for run in runs if run.reason):
        click.echo(reason if reason.startswith("error") else f"error: {reason}", err=True)
    if status == 2:
        remove_beginning(sweep)
    elif status:
        click.echo(f"the same command continues the sweep in {sweep.folder}", err=True)
    return status
