"""`accum-trainer merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from accum_trainer.runs.merge import Merged

_MADE = {
    "mean": "the mean of {} models",
    "concat": "one adapter that acts as the mean of {} (their ranks concatenated)",
    "product": "the base model with the mean of {} adapters' products added",
}


@click.command(
    "merge",
    epilog="Examples: accum-trainer merge runs/four   |   "
    "accum-trainer merge runs/a runs/b -o runs/a-and-b --eval-file held-out.jsonl",
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Where the merged model goes. Default: RUN/merged; needed where several runs are named.",
)
@click.option(
    "--adapter",
    type=click.Choice(["concat", "product"]),
    help="How LoRA adapters are merged: into one adapter of all their ranks (concat, the default), "
    "or into a whole model, "
    "the base plus the mean of their products.",
)
@click.option(
    "--eval-file",
    metavar="FILE",
    help="Rows to evaluate the parts and the merge on. Default: the runs' eval_file; the embedded "
    "corpus's own rows.",
)
@click.option(
    "--allow-unfinished",
    is_flag=True,
    help="Merge runs that did not come to their end as they stand.",
)
@click.option("--force", is_flag=True, help="Replace an earlier merge.")
def command(
    runs: tuple[str, ...],
    output: str | None,
    adapter: str | None,
    eval_file: str | None,
    allow_unfinished: bool,
    force: bool,
) -> None:
    """Average the results of independent runs, weighted by the samples that each was trained on.

    RUN is the folder of a parallel-independent run, or two or more run directories. Whole models
    are averaged tensor by tensor, LoRA adapters by what they do (the mean of their products),
    exactly. All runs must be finished and have started from the same weights. Writes what
    `from_pretrained` loads, and merge.json; prints the evaluation loss of each part and of the
    merge.
    """
    from accum_trainer.runs.merge import merge

    merged = merge(
        runs,
        output,
        adapter=adapter,
        eval_file=eval_file,
        allow_unfinished=allow_unfinished,
        force=force,
    )
    for note in merged.notes:
        click.echo(f"note: {note}", err=True)
    for row in _rows(merged):
        click.echo(row)
    click.echo(f"{merged.folder}: {_MADE[merged.method].format(len(merged.inputs))}")


def _rows(merged: Merged) -> list[str]:
    """The table: part, samples, weight, evaluation loss; then the merge."""
    cells = [("part", "samples", "weight", "evaluation loss")]
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
