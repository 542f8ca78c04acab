"""Pictures of runs: the look that all have, and loss.png. Knows records only; drawing imports
matplotlib.

Names in a picture come from folders of anyone: none is read as a formula, and none is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accum_trainer.train import durable
from accum_trainer.train.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = ("step", "skipped", "loss", "lr", "eval_loss")  # the keys that are drawn

# One per run, told apart by most colour-blind readers (Okabe and Ito); a report replaces them in
# the dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#c99700", "#3fa0d8")
INK = "#24292f"
# Curves that coincide must both be visible: later ones are dashed.
_LINES = ("-", "-", (0, (3, 3)))
# Of a vector picture: each is a point that a reader loads.
MOST_POINTS = 800


@contextlib.contextmanager
def picture(width: float, height: float, name: str = "") -> Iterator[Figure]:
    """An empty picture, sizes in inches, to be drawn and saved inside the `with`.

    Args:
        name: tells the ids of SVG pictures apart that share a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": f"accum_trainer {name}",  # the same picture, the same bytes
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    }
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width, height), layout="constrained")


def colour_of(number: int) -> str:
    """The colour of the run with this number, from 0."""
    return COLOURS[number % len(COLOURS)]


def line_of(number: int) -> Any:
    """The line style of the run with this number, from 0."""
    return _LINES[number % len(_LINES)]


def plot(axes: Axes, number: int, x: Any, y: Any, **look: Any) -> None:
    """Draw a curve of the run with this number, from 0."""
    drawn = {"color": colour_of(number), "linestyle": line_of(number), "linewidth": 1.4} | look
    axes.plot(*thinned(x, y, MOST_POINTS), **drawn)


def thinned(x: Any, y: Any, most: int) -> tuple[Any, Any]:
    """A curve of about as many points as `most`, with the lowest and the highest of each stretch,
    so that no spike is lost."""
    import numpy as np

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(y), most // 2 + 1).astype(int)
    kept = set()
    for first, end in itertools.pairwise(edges):
        part = y[first:end]
        if not np.isnan(part).all():
            kept |= {first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def finish(axes: Axes, names: Sequence[str] = (), **texts: str) -> None:
    """Give a part of a picture its frame, a legend of `names` for the curves that are labelled with
    anything, in their order, and its texts."""
    axes.set(**texts)
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        handles = axes.get_legend_handles_labels()[0]
        legend = axes.legend(
            handles, [str(number) for number in range(len(handles))], frameon=False
        )
        # Set afterwards: matplotlib leaves out names that begin with an underscore.
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)


def draw_loss(runs: Mapping[str, Sequence[Record]], path: Path, title: str) -> None:
    """Draw loss, and below it the learning rate, over optimizer updates; one curve per run (label
    -> records)."""
    with picture(8, 5.5) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        names = []
        for number, (label, records) in enumerate(runs.items()):
            updates = [record for record in records if not record["skipped"]]
            steps = [r["step"] for r in updates]
            plot(top, number, steps, [_drawn(r["loss"]) for r in updates], label="run")
            plot(bottom, number, steps, [_drawn(r["lr"]) for r in updates])
            names.append(label)
            evaluated = [record for record in updates if record.get("eval_loss") is not None]
            if evaluated:
                plot_evaluations(
                    top,
                    number,
                    [r["step"] for r in evaluated],
                    [r["eval_loss"] for r in evaluated],
                )
                names.append(f"{label}, evaluation")
        finish(top, names, ylabel="loss (mean per target)", title=title)
        finish(bottom, xlabel="optimizer updates", ylabel="learning rate")
        save(figure, path, title)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a picture, whose kind is the end of the name; the file is replaced whole.

    Args:
        title: for programs that list pictures.
    """
    with durable.replacing(path) as partial:
        kind = path.suffix[1:].lower()
        figure.savefig(partial, dpi=130, format=kind, metadata={"Title": title})


def plot_evaluations(axes: Axes, number: int, x: Any, y: Any) -> None:
    """Draw the evaluations of the run with this number."""
    plot(
        axes, number, x, y, linestyle="--", marker="o", markersize=3, alpha=0.7, label="evaluation"
    )


def _drawn(value: float | None) -> float:
    return float("nan") if value is None else value
