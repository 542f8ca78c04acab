"""ECharts options for curves over updates. Colours are the page's, so they follow its theme: the
charts are drawn as SVG, in which CSS variables hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accum_trainer.panel.curves import Numbers, RecordReader, points, smoothed

_SHORT = (
    "function(v){var a=Math.abs(v);return a!==0&&(a<0.001||a>=1e5)?v.toExponential(1):"
    "String(+v.toPrecision(4));}"
)


def base(name: str) -> dict[str, Any]:
    """A chart without curves yet; `name` is its title."""
    label = {"color": "var(--faint)", "fontSize": 11, "hideOverlap": True}
    axis = {
        "axisLabel": label,
        "axisLine": {"lineStyle": {"color": "var(--line)"}},
        "axisTick": {"show": False},
        "splitLine": {"lineStyle": {"color": "var(--line)", "width": 1}},
    }
    value = axis | {"type": "value", "scale": True}
    return {
        "animation": False,
        "aria": {"enabled": True, "label": {"description": f"{name} over optimizer updates"}},
        "grid": {"left": 8, "right": 14, "top": 12, "bottom": 4, "containLabel": True},
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            "backgroundColor": "var(--surface)",
            "borderColor": "var(--line)",
            "textStyle": {"color": "var(--ink)", "fontSize": 12},
            ":valueFormatter": _SHORT,
            "axisPointer": {"lineStyle": {"color": "var(--faint)"}},
        },
        "xAxis": value | {"splitLine": {"show": False}, "minInterval": 1},
        "yAxis": value | {"axisLabel": label | {":formatter": _SHORT}},
        "series": [],
    }


def _line(name: str, data: list[list[float | None]], color: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "line",
        "data": data,
        "showSymbol": len(data) == 1,
        "symbolSize": 6,
        "lineStyle": {"color": color, "width": 1.8} | more.pop("lineStyle", {}),
        "itemStyle": {"color": color},
    } | more


# Most runs beside the one that is shown, each in its colour.
OTHERS = ("var(--second)", "var(--third)", "var(--fourth)")


def draw_loss(
    options: dict[str, Any],
    records: RecordReader,
    log: bool,
    weight: float,
    others: Mapping[str, RecordReader],
) -> None:
    """Put loss, smoothed loss, evaluations and the smoothed loss of other runs into a chart's
    options.

    Args:
        log: a logarithmic axis.
        weight: of the past in the smoothed curve, 0 (no smoothing) to below 1.
        others: name -> records, at most as many as `OTHERS`.
    """
    series = []
    for (name, other), color in zip(others.items(), OTHERS, strict=False):
        values = smoothed(_drawable(other, log), weight)
        series.append(_line(name, points(other.columns["step"], values), color))
    steps, positive = records.columns["step"], _drawable(records, log)
    mine = "this run" if others else "smoothed" if weight > 0 else "loss"
    if weight > 0:
        faint = {"width": 1, "opacity": 0.35}
        series.append(_line("loss", points(steps, positive), "var(--accent)", lineStyle=faint))
        series.append(_line(mine, points(steps, smoothed(positive, weight)), "var(--accent)"))
    else:
        series.append(_line(mine, points(steps, positive), "var(--accent)"))
    evaluated = points(steps, records.columns["eval_loss"])
    if evaluated:
        series.append(
            _line(
                *("evaluation", evaluated, "var(--ink)"),
                showSymbol=True,
                lineStyle={"type": "dashed", "width": 1.2},
            )
        )
    options["yAxis"]["type"] = "log" if log else "value"
    options["legend"] = _legend([*others, mine]) | {"show": bool(others)}
    options["grid"]["top"] = 30 if others else 12
    options["series"] = series


def draw_side_by_side(
    options: dict[str, Any], runs: Mapping[str, RecordReader], log: bool, weight: float
) -> None:
    """Put the smoothed losses of runs into a chart's options, each in its own colour; beyond the
    colours that there are, dashed, then dotted.

    Args:
        log, weight: as for `draw_loss`.
        runs: name -> records.
    """
    colors = ("var(--accent)", *OTHERS)
    series = []
    for place, (name, records) in enumerate(runs.items()):
        values = smoothed(_drawable(records, log), weight)
        style = {"type": ("solid", "dashed", "dotted")[place // len(colors) % 3]}
        curve = points(records.columns["step"], values)
        series.append(_line(name, curve, colors[place % len(colors)], lineStyle=style))
    options["yAxis"]["type"] = "log" if log else "value"
    options["legend"] = _legend(list(runs)) | {"type": "scroll", "left": 8}
    options["grid"]["top"] = 34
    options["series"] = series


def _legend(names: list[str]) -> dict[str, Any]:
    return {
        "show": True,
        "data": names,
        "top": 0,
        "right": 8,
        "icon": "roundRect",
        "itemHeight": 3,
        "itemWidth": 18,
        "textStyle": {"color": "var(--soft)", "fontSize": 12},
    }


def _drawable(records: RecordReader, log: bool) -> Numbers:
    loss = records.columns["loss"]
    return [value if value is None or not log or value > 0 else None for value in loss]


def draw_column(options: dict[str, Any], records: RecordReader, key: str, name: str) -> None:
    """Put one column of the records into a chart's options."""
    data = points(records.columns["step"], records.columns[key], with_gaps=True)
    options["series"] = [_line(name, data, "var(--accent)")]
