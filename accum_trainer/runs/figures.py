"""The figures of runs as text, for tables: the same in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from accum_trainer.runs.compare import Compared, Comparison
from accum_trainer.runs.curve import Curve
from accum_trainer.runs.log_file import Log

NOTHING = "-"


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(names of the runs, rows of (title, a cell for each run)). A row without any value is left
    out."""
    runs = comparison.runs
    makers: list[tuple[str, Callable[[Compared], str]]] = [
        ("batch", lambda run: run.curve.split or number(run.curve.batch)),
        ("updates", lambda run: number(run.curve.total("updates"))),
        ("samples", lambda run: number(run.curve.total("samples"))),
        ("time", lambda run: duration(run.curve.total("seconds"))),
        ("last loss", lambda run: loss(float(run.curve.loss[-1]))),
    ]
    # One run alone ends where it ends, on all axes.
    places = comparison.common if len(runs) > 1 else {"updates": comparison.common["updates"]}
    for axis, place in places.items():
        at = duration(place) if axis == "seconds" else f"{place:,.0f} {axis}"
        makers.append((f"loss at {at}", lambda run, axis=axis: loss(run.loss_at[axis])))  # type: ignore[misc]
    makers += [
        ("last evaluation", lambda run: loss(last_evaluation(run.curve.log))),
        ("best evaluation", lambda run: loss(best_evaluation(run.curve.log))),
        ("loss variance", lambda run: f"{run.variance.value:.3g}" if run.variance else NOTHING),
        ("against the baseline", lambda run: f"{-run.fall.value:+.0%}" if run.fall else NOTHING),
        ("spikes", spikes),
        ("windows without an update", lambda run: nonzero(run.curve.log.num_skipped)),
        *((title, lambda run, of=of: of(run.curve)) for title, of in SPEED),
    ]
    rows = [(title, [make(run) for run in runs]) for title, make in makers]
    kept = [row for row in rows if any(cell != NOTHING for cell in row[1])]
    return [run.curve.label for run in runs], kept


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def nonzero(value: float) -> str:
    return f"{value:,.0f}" if value else NOTHING


def loss(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`0.8 s`, `95 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def spikes(run: Compared) -> str:
    """`2 (+1.31 at step 512)`: how many, and the highest."""
    if not run.spikes:
        return "0"
    worst = max(run.spikes, key=lambda spike: spike.height)
    step = int(run.curve.log.step[worst.place])
    return f"{len(run.spikes)} (+{worst.height:.2f} at step {step})"


def last_evaluation(log: Log) -> float | None:
    return log.evaluations[-1][1] if log.evaluations else None


def best_evaluation(log: Log) -> float | None:
    return min(value for _, value in log.evaluations) if log.evaluations else None


def _per_second(column: str, without_waiting: bool = False) -> Callable[[Curve], str]:
    def of(curve: Curve) -> str:
        amount, seconds = curve.log.column(column), curve.log.column("step_time_sec")
        if amount is None or seconds is None:
            return NOTHING
        if without_waiting:
            waited = curve.log.column("data_wait_sec")
            if waited is None:
                return NOTHING
            seconds = seconds - waited
        known = np.isfinite(amount) & np.isfinite(seconds)
        total = float(seconds[known].sum())
        return NOTHING if total <= 0 else f"{float(amount[known].sum()) / total:,.0f}"

    return of


def _padding(curve: Curve) -> str:
    """Of all positions, those that hold no token."""
    tokens, share = curve.log.column("num_tokens"), curve.log.column("padding_efficiency")
    if tokens is None or share is None:
        return NOTHING
    known = (share > 0) & np.isfinite(tokens)
    positions = float((tokens[known] / share[known]).sum())
    return NOTHING if positions <= 0 else f"{1 - float(tokens[known].sum()) / positions:.1%}"


def _over_all(
    column: str, reduce: Callable[[np.ndarray], float], shown: Callable[[float], str]
) -> Callable[[Curve], str]:
    """One figure of all known numbers of a column."""

    def of(curve: Curve) -> str:
        numbers = curve.log.column(column)
        return NOTHING if numbers is None else shown(float(reduce(numbers)))

    return of


def _noise_scale(curve: Curve) -> str:
    """The last estimate, with its interval."""
    numbers = curve.log.column("noise_scale")
    if numbers is None:
        return NOTHING
    place = np.flatnonzero(np.isfinite(numbers))[-1]
    text = f"{numbers[place]:,.0f}"
    ends = [curve.log.column(f"noise_scale_{end}") for end in ("low", "high")]
    known = [float(end[place]) for end in ends if end is not None and np.isfinite(end[place])]
    return f"{text} ({known[0]:,.0f} to {known[1]:,.0f})" if len(known) == 2 else text


SPEED: list[tuple[str, Callable[[Curve], str]]] = [
    ("samples per second", _per_second("effective_batch_size")),
    ("tokens per second", _per_second("num_tokens")),
    ("the same without waiting", _per_second("num_tokens", without_waiting=True)),
    ("padding", _padding),
    ("peak memory, GB", _over_all("peak_gb", np.nanmax, "{:.2f}".format)),
    ("micro-batches split", _over_all("oom_splits", np.nansum, nonzero)),
    ("FLOPs utilisation", _over_all("mfu", np.nanmean, "{:.1%}".format)),
    ("noise scale, samples", _noise_scale),
]
