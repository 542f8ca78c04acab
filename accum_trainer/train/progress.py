"""A running training in figures for people, from its records: rates, trend, time left.

Rates cover the last windows, so that one slow window does not hide the rest. Knows records and a
clock, no terminal and no engine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from accum_trainer.train.records import Record

# Windows that rates, trend and time left look back on.
RECENT = 50
# Fewer losses have no trend.
_FEWEST = 8


@dataclass(frozen=True)
class Trend:
    """How the loss changes: a straight line through the last losses, by least squares.

    Attributes:
        slope: change of the loss per update.
        word: `falling`, `rising`, or `level` if the slope is within two of its standard errors.
    """

    slope: float
    word: str

    def describe(self) -> str:
        """In words, per 100 updates: a slope per update has too many zeros to read."""
        if self.word == "level":
            return "level"
        return f"{self.word} {abs(self.slope) * 100:.3g} per 100 updates"


class Progress:
    """The state of a training as far as its records so far tell.

    Args:
        total_updates: of the whole run.
        done: updates that are done already.
        clock: seconds, monotonic.

    Attributes:
        last: the newest record, or None.
        losses: of the last updates, oldest first.
        last_eval: (update, loss) of the newest evaluation, or None.
        skipped: windows without an update since this process began.
    """

    def __init__(
        self, total_updates: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_updates = total_updates
        self.last: Record | None = None
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.last_eval: tuple[int, float] | None = None
        self.skipped = 0
        self._noise: Record | None = None
        self._clock = clock
        self._recent: deque[Record] = deque(maxlen=RECENT)
        # When how many updates were done: evaluation and checkpoints are part of the time left.
        self._times: deque[tuple[float, int]] = deque([(clock(), done)], maxlen=RECENT + 1)

    def add(self, record: Record) -> None:
        """Take note of one more record."""
        self.last = record
        self._recent.append(record)
        if record["skipped"]:
            self.skipped += 1
            return
        self._times.append((self._clock(), record["step"]))
        if math.isfinite(record["loss"]):
            self.losses.append(record["loss"])
        if record.get("eval_loss") is not None:
            self.last_eval = record["step"], record["eval_loss"]
        if record.get("noise_scale") is not None:
            self._noise = record

    @property
    def done(self) -> int:
        """Updates that are done."""
        return self._times[-1][1]

    @property
    def tokens_per_sec(self) -> float:
        """Tokens without padding, over all processes, per second of the last windows."""
        return self._per_second(waiting=True)

    @property
    def tokens_per_sec_computing(self) -> float:
        """The same without the seconds in which training waited for data."""
        return self._per_second(waiting=False)

    def _per_second(self, waiting: bool) -> float:
        seconds = sum(
            r["step_time_sec"] - (0.0 if waiting else r["data_wait_sec"]) for r in self._recent
        )
        return sum(r["num_tokens"] for r in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def padding(self) -> float:
        """The share of the computed positions that is padding, in the last windows."""
        positions = sum(r["num_tokens"] / (r["padding_efficiency"] or 1) for r in self._recent)
        tokens = sum(r["num_tokens"] for r in self._recent)
        return 1 - tokens / positions if positions > 0 else 0.0

    @property
    def mfu(self) -> float | None:
        """Utilisation of the devices by useful work in the last windows; None if not known."""
        known = [r for r in self._recent if r.get("mfu") is not None]
        seconds = sum(r["step_time_sec"] for r in known)
        return sum(r["mfu"] * r["step_time_sec"] for r in known) / seconds if seconds else None

    @property
    def noise_scale(self) -> tuple[float, float | None, float | None] | None:
        """The newest noise scale and its interval, in samples; None until it is known."""
        if self._noise is None:
            return None
        low, high = (self._noise.get(f"noise_scale_{end}") for end in ("low", "high"))
        return self._noise["noise_scale"], low, high

    @property
    def trend(self) -> Trend | None:
        """How the loss changes; None before a few updates."""
        if len(self.losses) < _FEWEST:
            return None
        losses = np.array(self.losses)
        steps = np.arange(len(losses)) - (len(losses) - 1) / 2
        spread = float((steps**2).sum())
        slope = float((steps * losses).sum()) / spread
        residuals = losses - losses.mean() - slope * steps
        error = math.sqrt(float((residuals**2).sum()) / (len(losses) - 2) / spread)
        word = "falling" if slope < 0 else "rising"
        return Trend(slope, word if abs(slope) > 2 * error else "level")

    @property
    def seconds_left(self) -> float | None:
        """Until the last update, at the pace of the last ones; None before the first."""
        (begun, first), (now, done) = self._times[0], self._times[-1]
        if done == first:
            return None
        return (self.total_updates - done) * (now - begun) / (done - first)


def clock_time(seconds: float | None) -> str:
    """`1:02:03`, with days before it if there are any; `-:--:--` if it is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def progress_line(progress: Progress) -> str:
    """One line of plain text about the newest record, for logs."""
    record = progress.last
    assert record is not None, "there is no record yet"
    beginning = f"update {record['step']}/{progress.total_updates}"
    if record["skipped"]:
        where = f" gradient of {name}" if (name := record.get("nonfinite_parameter")) else ""
        return f"{beginning}  SKIPPED ({record['skip_reason']}{where})"
    parts = [f"loss {record['loss']:.4f}"]
    if record.get("eval_loss") is not None:
        parts.append(f"eval {record['eval_loss']:.4f}")
    parts += [
        f"lr {record['lr']:.3g}",
        f"norm {record['grad_norm']:.3g}",
        f"{progress.tokens_per_sec:,.0f} tokens/s",
    ]
    if (mfu := progress.mfu) is not None:
        parts.append(f"MFU {mfu:.1%}")
    if record["oom_splits"]:
        parts.append(f"{record['oom_splits']} split in two (out of memory)")
    if record["step"] < progress.total_updates:
        parts.append(f"{clock_time(progress.seconds_left)} left")
    return "  ".join([beginning, *parts])
