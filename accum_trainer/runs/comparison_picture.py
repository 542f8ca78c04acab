"""The curves of compared runs, as a picture file or as SVG for a page. Computes no figure."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accum_trainer.runs.compare import Comparison
from accum_trainer.runs.curve import AXES, Curve
from accum_trainer.runs.loss_noise import running_mean
from accum_trainer.train.loss_picture import (
    COLOURS,
    INK,
    colour_of,
    finish,
    line_of,
    picture,
    plot,
    plot_evaluations,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below this many updates a curve is drawn as it is; above, its mean over a part of it too.
_SMOOTH_FROM = 40
_SMOOTHED_PART = 25
_LONGEST_NAME = 60


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw loss over updates, samples and time, and the variances, into a new file at `path`; its
    kind is the end of the name."""
    axes = [axis for axis in AXES if axis in comparison.common]
    rows = (len(axes) + 2) // 2
    with picture(10, 3.6 * rows + 0.6) as figure:
        parts = figure.subplots(rows, 2, squeeze=False).flatten()
        for part, axis in zip(parts, axes, strict=False):
            _draw_axis(part, comparison, axis)
        _draw_variances(parts[len(axes)], comparison)
        for part in parts[len(axes) + 1 :]:
            part.set_visible(False)
        _name_runs(figure, comparison)
        save(figure, path, " | ".join(run.curve.name for run in comparison.runs))


def axis_svg(comparison: Comparison, axis: str, narrow: bool) -> str:
    """The loss of all runs over one axis, as an SVG element for a page of either width."""
    return _svg(axis, lambda part: _draw_axis(part, comparison, axis), narrow)


def variances_svg(comparison: Comparison, narrow: bool) -> str:
    """The variances of all runs, as an SVG element."""
    height = 1.0 + 0.4 * len(comparison.runs)
    return _svg("variances", lambda part: _draw_variances(part, comparison), narrow, height)


def column_svg(number: int, curve: Curve, column: str, narrow: bool) -> str:
    """Another number of the records of the run with this number, over updates, as an SVG
    element."""

    def draw(part: Axes) -> None:
        x, y = curve.axes["updates"], curve.log.columns[column]
        plot(part, number, x, y, linestyle="-", linewidth=1.1)
        finish(part, xlabel=AXES["updates"])

    return _svg(f"{column} {number}", draw, narrow, height=2.4)


def _draw_axis(part: Axes, comparison: Comparison, axis: str) -> None:
    curves = [run.curve for run in comparison.runs]
    ends = [end for curve in curves if (end := curve.total(axis)) is not None]
    divisor, unit = _unit(max(ends)) if axis == "seconds" else (1.0, AXES[axis])
    for number, curve in enumerate(curves):
        if axis not in curve.axes:
            continue
        x, loss = curve.axes[axis] / divisor, curve.loss
        if len(loss) < _SMOOTH_FROM:
            plot(part, number, x, loss)
        else:
            plot(part, number, x, loss, linestyle="-", linewidth=0.8, alpha=0.4)
            smoothed = running_mean(loss, len(loss) // _SMOOTHED_PART)
            plot(part, number, x, smoothed, linewidth=1.8)
        if curve.log.evaluations:
            steps, losses = (np.array(one) for one in zip(*curve.log.evaluations, strict=True))
            places = np.interp(steps, curve.log.step, x)
            plot_evaluations(part, number, places, losses)
    part.ticklabel_format(axis="x", style="plain", useOffset=False)
    finish(part, xlabel=unit, ylabel="loss (mean per target)")


def _unit(seconds: float) -> tuple[float, str]:
    for divisor, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds > 2 * divisor:
            return divisor, f"{name} of training"
    return 1.0, AXES["seconds"]


def _draw_variances(part: Axes, comparison: Comparison) -> None:
    values = [run.variance.value if run.variance else 0.0 for run in comparison.runs]
    places = np.arange(len(values))
    part.barh(
        places, values, color=[colour_of(number) for number in range(len(values))], height=0.6
    )
    for place, run in enumerate(comparison.runs):
        text = "too few updates" if run.variance is None else f"{run.variance.value:.3g}"
        if run.fall is not None:
            text += f"  ({-run.fall.value:+.0%})"
        elif place == comparison.baseline and len(values) > 1:
            text += "  (baseline)"
        part.annotate(
            text, (values[place], place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    part.set_yticks(places, [_short(run.curve.label) for run in comparison.runs])
    part.invert_yaxis()
    part.margins(x=0.35)
    finish(part, xlabel="variance of the loss around its trend")


def _name_runs(figure: Figure, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    lines: list[Any] = [
        Line2D([], [], color=colour_of(number), linestyle=line_of(number), linewidth=1.8)
        for number in range(len(comparison.runs))
    ]
    numbers, columns = [str(number) for number in range(len(lines))], 2 if len(lines) > 2 else 1
    legend = figure.legend(lines, numbers, loc="outside upper left", frameon=False, ncols=columns)
    for text, run in zip(legend.get_texts(), comparison.runs, strict=True):
        text.set_text(_short(run.curve.name))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _svg(name: str, draw: Callable[[Axes], None], narrow: bool, height: float = 3.6) -> str:
    """An SVG element whose colours are the page's: its text, and `--run-0` to `--run-5`."""
    with picture(4.2 if narrow else 9.0, height, f"{name} {narrow}") as figure:
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = element.replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        element = element.replace(colour, f"var(--run-{number})")
    # The page gives it a width.
    return re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', element, count=1)
