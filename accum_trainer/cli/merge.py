"""`accum-trainer merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from accum_trainer.cli.file_completion import path_argument, path_option

if TYPE_CHECKING:
    from accum_trainer.runs.merge import Merged

_RESULTS = {
    "mean": "the mean of {} models",
    "concat": "one adapter that equals the mean of {} (their ranks concatenated)",
    "product": "the base model with the mean of {} adapters' products added",
}


@click.command(
    "merge",
    epilog="Examples: accum-trainer merge runs/four   |   "
    "accum-trainer merge runs/a runs/b -o runs/a-and-b --eval-file held-out.jsonl",
)
@path_argument("runs", metavar="RUN...", nargs=-1, required=True)
@path_option(
    "-o",
    "--output",
    metavar="DIR",
    help="Folder of the merged model. Default: RUN/merged; required if several runs are named.",
)
@click.option(
    "--adapter",
    type=click.Choice(["concat", "product"]),
    help="How to merge LoRA adapters: concat (default), into one adapter of all their ranks; "
    "product, into a whole model, the base plus the mean of their products.",
)
@path_option(
    "--eval-file",
    metavar="FILE",
    help="Rows to evaluate the runs and the merge on. Default: the runs' eval_file, or the "
    "embedded corpus's evaluation rows.",
)
@click.option(
    "--allow-unfinished",
    is_flag=True,
    help="Also merge runs that have not finished, as they stand.",
)
@click.option("--force", is_flag=True, help="Replace an earlier merge.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let the models run Python code that comes with them; needed even if the runs had it.",
)
def command(
    runs: tuple[str, ...],
    output: str | None,
    adapter: str | None,
    eval_file: str | None,
    allow_unfinished: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Average the results of independent runs, each weighted by the samples that it trained on.

    RUN is the folder of a parallel-independent run, or two or more run directories. Whole models
    are averaged tensor by tensor; LoRA adapters are merged into the exact mean of their products.
    All runs must be finished and have started from the same weights. Writes a model for
    `from_pretrained`, and merge.json; prints the evaluation loss of each run and of the merge.
    """
    from accum_trainer.runs.merge import merge

    merged = merge(
        runs,
        output,
        adapter=adapter,
        eval_file=eval_file,
        allow_unfinished=allow_unfinished,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    for note in merged.notes:
        click.echo(f"note: {note}", err=True)
    for row in _rows(merged):
        click.echo(row)
    click.echo(f"{merged.folder}: {_RESULTS[merged.method].format(len(merged.inputs))}")


def _rows(merged: Merged) -> list[str]:
    """A line for each run, with samples, weight and evaluation loss; then the merge."""
    cells = [("run", "samples", "weight", "evaluation loss")]
    for run, loss in zip(merged.inputs, merged.input_losses, strict=True):
        cells.append(
            (
                run.name,
                f"{run.num_samples}",
                f"{run.num_samples / merged.num_samples:.4f}",
                _loss(loss),
            )
        )
    cells.append(("merge", f"{merged.num_samples}", "1.0000", _loss(merged.loss)))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in cells
    ]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
