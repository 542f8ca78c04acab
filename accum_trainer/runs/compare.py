"""Compare the loss curves of runs: at equal updates, samples and time, and how noisy they are.

The verdict: does the variance of the loss fall by at least half against the run of the smallest
batch? Reads logs only; draws and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accum_trainer.errors import ConfigError
from accum_trainer.runs.curve import AXES, Curve, check_axis, read_curves
from accum_trainer.runs.loss_noise import Spike, Variance, find_spikes, variance_around_trend

# A fall of the variance that counts as a steadier loss.
ENOUGH = 0.5
# Updates that every run needs on the samples that all runs have seen.
_FEWEST_SHARED = 30


@dataclass(frozen=True)
class Fall:
    """By how much of the baseline's variance a run's is lower; negative if it is higher.

    Attributes:
        value, low, high: the share, and the ends of its 95 % interval.
        least, most: the ends if the losses of a log that has not every update are means over those
            that it left out, as some trainers write them, or are not; one cannot tell.
    """

    value: float
    low: float
    high: float
    least: float
    most: float

    @property
    def verdict(self) -> str:
        """`yes` or `no`: whether it is at least half; `not certain` if half is between `least` and
        `most`."""
        if self.least < ENOUGH <= self.most:
            return "not certain"
        return "yes" if self.least >= ENOUGH else "no"

    def describe(self) -> str:
        """`lower by 93 % (89 % to 95 %)`."""
        if self.value < 0:
            return f"higher by {-self.value:.0%} ({-self.high:.0%} to {-self.low:.0%})"
        return f"lower by {self.value:.0%} ({self.low:.0%} to {self.high:.0%})"


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Attributes:
        curve: the run.
        variance: of the loss around its trend, in the range that is compared; None if that has too
            few updates.
        fall: against the baseline; None for the baseline, or if a variance is not known.
        spikes: in the whole run.
        loss_at: axis -> mean loss at the last place on it that all runs reach.
    """

    curve: Curve
    variance: Variance | None
    fall: Fall | None
    spikes: list[Spike]
    loss_at: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: in the order in which they were named.
        baseline: place in `runs` of the one that the others are measured against.
        baseline_reason: why that one.
        axis: of the range in which variances are compared, `updates` or `samples`.
        until: where it ends: all runs get there.
        range_reason: why that axis.
        common: axis -> the last place on it that all runs reach.
    """

    runs: list[Compared]
    baseline: int
    baseline_reason: str
    axis: str
    until: float
    range_reason: str
    common: dict[str, float]

    def describe_range(self) -> str:
        """`updates up to 100 of each run (chosen)`."""
        return f"{self.axis} up to {self.until:,.0f} of each run ({self.range_reason})"

    def verdicts(self) -> list[str]:
        """A sentence for each run but the baseline."""
        if len(self.runs) < 2:
            return []
        base = self.runs[self.baseline]
        lines = []
        for run in self.runs:
            if run is base:
                continue
            if run.fall is None:
                lines.append(f"{run.curve.label}: no variance to compare; see the table")
                continue
            lines.append(
                f"{run.curve.label}: loss variance {run.fall.describe()} against "
                f"{base.curve.label}; at least {ENOUGH:.0%} lower: {run.fall.verdict}"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """All figures, for `--json`."""
        return {
            "accum_trainer": "comparison",
            "baseline": self.runs[self.baseline].curve.label,
            "baseline_reason": self.baseline_reason,
            "variance_range": {"axis": self.axis, "until": self.until, "reason": self.range_reason},
            "variance_definition": "mean squared distance of each loss from the line through its "
            "neighbours, divided by that of independent noise of variance 1",
            "spike_definition": "losses in a row above the running median of 25 by more than 6 "
            "robust standard deviations",
            "common": self.common,
            "runs": [self._run_as_json(run) for run in self.runs],
        }

    def _run_as_json(self, run: Compared) -> dict[str, Any]:
        curve, fall = run.curve, run.fall
        return {
            "label": curve.label,
            "path": str(curve.log.path),
            "split": curve.split or None,
            "effective_batch_size": curve.batch,
            **{axis: curve.total(axis) for axis in AXES},
            "last_loss": float(curve.loss[-1]),
            "loss_at": run.loss_at,
            "variance": run.variance.value if run.variance is not None else None,
            "variance_updates": run.variance.updates if run.variance is not None else None,
            "variance_fall": fall.value if fall is not None else None,
            "variance_fall_95": [fall.low, fall.high] if fall is not None else None,
            "at_least_half": fall.verdict if fall is not None else None,
            "spikes": [
                {
                    "step": int(curve.log.step[spike.place]),
                    "height": spike.height,
                    "updates": spike.updates,
                }
                for spike in run.spikes
            ],
            "skipped": curve.log.num_skipped,
            "notes": list(curve.notes),
        }


def compare(
    runs: Sequence[str | Path],
    baseline: str | None = None,
    axis: str = "auto",
    batch_sizes: Sequence[int] | None = None,
) -> Comparison:
    """Compare the runs in run directories and JSONL files; one alone is described.

    Args:
        baseline: the label or the place (from 1) of the run that the others are measured against;
            by default that of the smallest effective batch.
        axis: on which variances are compared: `updates`, `samples`, or `auto`.
        batch_sizes: samples per update of logs that do not tell.

    Raises:
        ConfigError, DataError: as `read_curves` raises them; or there is no such baseline, or a run
            has no such axis.
    """
    return compare_curves(read_curves(runs, batch_sizes), baseline, axis)


def compare_curves(
    curves: Sequence[Curve], baseline: str | None = None, axis: str = "auto"
) -> Comparison:
    """`compare` for curves that were read."""
    place, reason = _baseline(curves, baseline)
    chosen, range_reason = _axis(curves, axis)
    common = {
        name: min(curve.axes[name][-1].item() for curve in curves)
        for name in AXES
        if all(name in curve.axes for curve in curves)
    }
    until = common[chosen]
    variances = [_variance(curve, chosen, until) for curve in curves]
    compared = [
        Compared(
            curve,
            variance,
            (
                fall_of(variances[place], variance, curves[place].every, curve.every)
                if number != place
                else None
            ),
            find_spikes(curve.loss),
            {name: curve.loss_at(name, end) for name, end in common.items()},
        )
        for number, (curve, variance) in enumerate(zip(curves, variances, strict=True))
    ]
    return Comparison(compared, place, reason, chosen, until, range_reason, common)


def _baseline(curves: Sequence[Curve], asked: str | None) -> tuple[int, str]:
    labels = [curve.label for curve in curves]
    if asked is not None:
        if asked in labels:
            return labels.index(asked), "chosen"
        if asked.isdecimal() and 1 <= int(asked) <= len(labels):
            return int(asked) - 1, "chosen"
        raise ConfigError(
            f"baseline={asked} is none of the runs; give a number from 1 to {len(labels)}, or one "
            f"of {', '.join(labels)}"
        )
    batches = [curve.batch for curve in curves]
    known = [batch for batch in batches if batch is not None]
    if len(known) < len(batches):
        return 0, "named first; not all logs tell their batch"
    smallest = min(known)
    if known.count(smallest) == len(known) and len(known) > 1:
        return 0, f"named first; all have an effective batch of {smallest}"
    return known.index(smallest), f"the smallest effective batch, {smallest}"


def _axis(curves: Sequence[Curve], asked: str) -> tuple[str, str]:
    if asked != "auto":
        check_axis(curves, asked)
        return asked, "chosen"
    if not all("samples" in curve.axes for curve in curves):
        return "updates", "not all logs tell their samples"
    seen = [curve.axes["samples"] for curve in curves]
    until = min(float(samples[-1]) for samples in seen)
    fewest = min(int(np.count_nonzero(samples <= until)) for samples in seen)
    if fewest < _FEWEST_SHARED:
        return "updates", (
            f"on the {until:,.0f} samples that all have seen, one made {fewest} updates only"
        )
    return "samples", "all have seen them"


def _variance(curve: Curve, axis: str, until: float) -> Variance | None:
    chosen = curve.axes[axis] <= until
    x = curve.axes["samples" if "samples" in curve.axes else "updates"]
    return variance_around_trend(x[chosen], curve.loss[chosen])


def fall_of(
    base: Variance | None, other: Variance | None, base_every: int = 1, other_every: int = 1
) -> Fall | None:
    """By how much `other` is lower than `base`; None if one is not known, or `base` is 0.

    Args:
        base_every, other_every: updates from one record to the next. A mean over n updates has an
            n-th of their variance.
    """
    if base is None or other is None or base.value <= 0:
        return None
    ratio = other.value / base.value
    (base_down, base_up), (down, up) = base.log_interval, other.log_interval
    # The interval of a difference from those of its parts (Zou and Donner 2008, MOVER).
    largest = ratio * math.exp(math.hypot(up, base_down))
    smallest = ratio * math.exp(-math.hypot(down, base_up))
    more, less = (1, 1) if base_every == other_every else (other_every, base_every)
    return Fall(1 - ratio, 1 - largest, 1 - smallest, 1 - largest * more, 1 - smallest / less)
