"""loss.png: the curves of one or more runs. Knows records only; drawing imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from accum_trainer.train.records import Record

CURVES = ("step", "skipped", "loss", "lr", "eval_loss")  # the keys that are drawn


def draw_loss(runs: Mapping[str, Sequence[Record]], path: Path, title: str) -> None:
    """Draw loss, and below it the learning rate, over optimizer updates; one curve per run (label
    -> records)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    # Curves that coincide must both be visible: later ones are dashed.
    for (label, records), style in zip(runs.items(), cycle(["-", "-", (0, (3, 3))]), strict=False):
        updates = [record for record in records if not record["skipped"]]
        top.plot(
            [r["step"] for r in updates],
            [r["loss"] for r in updates],
            label=label,
            linewidth=1.4,
            linestyle=style,
        )
        bottom.plot(
            [r["step"] for r in updates], [r["lr"] for r in updates], linewidth=1.4, linestyle=style
        )
        evaluated = [record for record in updates if record.get("eval_loss") is not None]
        if evaluated:
            top.plot(
                [r["step"] for r in evaluated],
                [r["eval_loss"] for r in evaluated],
                "o--",
                markersize=3,
                label=f"{label}, evaluation",
            )
    top.set(ylabel="loss (mean per target)", title=title)
    bottom.set(xlabel="optimizer updates", ylabel="learning rate")
    top.legend(frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
