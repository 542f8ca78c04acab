"""Rates, trend and time left of a running training, from records made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from accum_trainer.train.display import sparkline
from accum_trainer.train.progress import RECENT, Progress, clock_time, progress_line


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def record(step, **more):
    return {
        "step": step,
        "skipped": False,
        "skip_reason": "",
        "oom_splits": 0,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "num_tokens": 90,
        "padding_efficiency": 0.9,
        "step_time_sec": 2.0,
        "data_wait_sec": 0.5,
        "mfu": None,
    } | more


def test_rates_and_time_left_by_hand():
    clock = Clock()
    progress = Progress(10, done=2, clock=clock)
    assert progress.seconds_left is None and progress.mfu is None and progress.trend is None
    for step in (3, 4):
        clock.now += 3.0  # with what is not part of a step, such as an evaluation
        progress.add(record(step, mfu=0.1 * step))
    assert progress.tokens_per_sec == pytest.approx(180 / 4)
    assert progress.tokens_per_sec_computing == pytest.approx(180 / 3)
    assert progress.padding == pytest.approx(0.1)
    assert progress.mfu == pytest.approx(0.35)
    assert progress.seconds_left == pytest.approx(6 * 3.0)
    assert progress.done == 4


def test_a_window_without_update_is_no_progress_and_no_loss():
    progress = Progress(10, clock=Clock())
    progress.add(record(1, loss=3.0))
    skip = {"skipped": True, "skip_reason": "non-finite", "nonfinite_parameter": "lm_head.weight"}
    progress.add(record(1, loss=math.nan, **skip))
    assert progress.skipped == 1 and progress.done == 1 and list(progress.losses) == [3.0]
    assert progress_line(progress) == (
        "update 1/10  SKIPPED (non-finite gradient of lm_head.weight)"
    )


@pytest.mark.parametrize(
    "slope, noise, word", [(-0.01, 0.05, "falling"), (0.01, 0.05, "rising"), (0.0, 1.0, "level")]
)
def test_the_trend_is_the_line_of_least_squares(slope, noise, word):
    progress = Progress(1000, clock=Clock())
    losses = 5 + slope * np.arange(200) + noise * np.random.default_rng(0).normal(size=200)
    for step, loss in enumerate(losses, start=1):
        progress.add(record(step, loss=float(loss)))
    expected = np.polyfit(np.arange(RECENT), losses[-RECENT:], 1)[0]
    assert progress.trend.slope == pytest.approx(expected)
    assert progress.trend.word == word


def test_noise_scale_is_the_newest_that_is_known():
    progress = Progress(10, clock=Clock())
    assert progress.noise_scale is None
    progress.add(record(1, noise_scale=96.0, noise_scale_low=60.0, noise_scale_high=150.0))
    progress.add(record(2, noise_scale=None, noise_scale_low=None, noise_scale_high=None))
    assert progress.noise_scale == (96.0, 60.0, 150.0)


def test_words():
    assert [clock_time(s) for s in (None, 59.6, 3725, 90000)] == [
        *("-:--:--", "0:01:00", "1:02:05", "1 d 1:00:00")
    ]
    assert sparkline([0, 7, 3.5]) == "▁█▅" and sparkline([1, 1]) == "▁▁"
