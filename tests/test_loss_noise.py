"""Variance around the trend and spikes: against closed forms, and against the formula written as a
loop."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from accum_trainer.runs.compare import Fall, compare, fall_of
from accum_trainer.runs.loss_noise import (
    find_spikes,
    running_mean,
    running_median,
    variance_around_trend,
)


def falling(count, begin=8.0, end=4.0):
    """A learning curve: steep first."""
    return end + (begin - end) * np.exp(-np.arange(count) / (count / 6))


def test_the_formula_by_hand():
    # The line through 3 and 5 is 4 in their middle: the residual of 7 is -3, divided by
    # sqrt(1/4 + 1/4 + 1); ten losses are the fewest.
    loss = np.array([3.0, 7.0, 5.0] + [5.0] * 7)
    found = variance_around_trend(np.arange(10), loss)
    # Residuals: -3, then (7 + 5) / 2 - 5 = 1, then nothing.
    assert found.value == pytest.approx((9 + 1) / 1.5 / 8)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_formula(seed):
    draw = np.random.default_rng(seed)
    x, loss = np.cumsum(draw.integers(1, 9, 200)), draw.normal(size=200)
    squares = []
    for i in range(1, 199):
        a = (x[i + 1] - x[i]) / (x[i + 1] - x[i - 1])
        e = a * loss[i - 1] + (1 - a) * loss[i + 1] - loss[i]
        squares.append(e * e / (a * a + (1 - a) ** 2 + 1))
    assert variance_around_trend(x, loss).value == pytest.approx(statistics.mean(squares))


@pytest.mark.parametrize("gaps", [1, 7])
@pytest.mark.parametrize("slope", [0.0, -0.5, 100.0])
def test_a_slope_of_any_size_adds_nothing(slope, gaps):
    x = np.cumsum(np.random.default_rng(1).integers(1, gaps + 1, 500))
    assert variance_around_trend(x, 3 + slope * x).value == pytest.approx(
        0, abs=1e-20 + 1e-15 * slope**2
    )


def test_it_is_the_variance_of_the_noise_on_a_learning_curve():
    """Within 2 % on average over 200 curves, where the plain variance is forty times it; and its
    interval holds the truth as often as it says."""
    draw, found, held = np.random.default_rng(2), [], 0
    for _ in range(200):
        loss = falling(400) + draw.normal(0, 0.2, 400)
        variance = variance_around_trend(np.arange(400), loss)
        found.append(variance.value)
        held += abs(np.log(variance.value / 0.04)) < 1.96 * variance.log_error
    assert np.mean(found) == pytest.approx(0.04, rel=0.02)
    assert loss.var() > 20 * 0.04
    assert 0.90 <= held / 200 <= 0.98


@pytest.mark.parametrize(("base", "other"), [(480, 30), (30, 30), (30, 480), (1000, 1000)])
def test_a_fall_of_exactly_half_is_called_less_or_more_as_seldom_as_95_percent_say(base, other):
    """K = 1 against K = 16 on the same samples is 480 updates against 30."""
    draw, verdicts = np.random.default_rng(7), []
    for _ in range(1500):
        curves = (
            variance_around_trend(np.arange(count), falling(count) + draw.normal(0, noise, count))
            for count, noise in ((base, 0.2), (other, 0.2 * 0.5**0.5))
        )
        verdicts.append(fall_of(*curves).verdict)
    for wrong in ("yes", "no"):
        assert verdicts.count(wrong) / len(verdicts) < 0.04, wrong


def test_two_runs_of_one_noise_are_equal_whatever_they_learn_per_update():
    """K = 16 falls sixteen times as fast per update: on a straight fall, to the last bit of it."""
    noise = np.random.default_rng(3).normal(0, 0.1, 300)
    places = np.arange(300)
    slow = variance_around_trend(places, noise - 0.001 * places)
    fast = variance_around_trend(16 * places, noise - 0.016 * places)
    assert fast.value == pytest.approx(slow.value, rel=1e-9)


def test_of_few_or_equal_losses_or_places():
    assert variance_around_trend(np.arange(9), np.arange(9.0)) is None
    flat = variance_around_trend(np.arange(20), np.full(20, 3.0))
    assert (flat.value, flat.log_error) == (0, 0)
    at_once = variance_around_trend(np.zeros(20), np.tile([1.0, 2.0], 10))
    assert at_once.value == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("count", [1, 2, 10, 24, 25, 26, 200, 70_000])
def test_running_median_and_mean_are_those_of_each_window(count):
    numbers = np.random.default_rng(4).normal(size=count)
    medians, means = running_median(numbers), running_mean(numbers, 12)
    for i in {*range(0, count, max(1, count // 150)), count - 1}:
        near = min(12, i, count - 1 - i)
        window = numbers[i - near : i + near + 1].tolist()
        assert medians[i] == pytest.approx(statistics.median(window))
        near = max(near, 3)
        window = numbers[max(0, i - near) : i + near + 1].tolist()
        assert means[i] == pytest.approx(statistics.mean(window))


def test_spikes_are_found_on_a_steep_noisy_curve_and_nothing_else():
    draw = np.random.default_rng(5)
    for _ in range(20):
        loss = falling(1000) + draw.normal(0, 0.1, 1000)
        assert find_spikes(loss) == []
        loss[300] += 2
        loss[600:604] += [2, 3, 3.5, 2]
        loss[800] -= 3  # downwards is none
        found = find_spikes(loss)
        assert [(spike.place, spike.updates) for spike in found] == [(300, 1), (602, 4)]
        assert found[0].height == pytest.approx(2, abs=0.4)


def test_a_new_level_and_a_flat_curve_have_no_spike():
    draw = np.random.default_rng(6)
    assert find_spikes(np.full(100, 2.0)) == []
    assert find_spikes(np.repeat([2.0, 5.0], 100) + draw.normal(0, 0.1, 200)) == []
    assert find_spikes(np.array([1.0, 9.0, 1.0])) == []


def logged(path, noise, every, count=600):
    draw = np.random.default_rng(8)
    loss = falling(count) + draw.normal(0, noise, count)
    if every > 1:  # as a trainer that logs the mean since its last record
        loss = loss.reshape(-1, every).mean(1)
    steps = range(every, count + 1, every)
    lines = (f'{{"step": {step}, "loss": {one}}}\n' for step, one in zip(steps, loss, strict=True))
    path.write_text("".join(lines))
    return path


def test_means_over_updates_are_no_steadier_loss(tmp_path):
    """One noise, logged by two trainers: the fall of 90 % may be the logging's."""
    each, tenth = logged(tmp_path / "a.jsonl", 0.2, 1), logged(tmp_path / "b.jsonl", 0.2, 10)
    [_, found] = compare([each, tenth]).runs
    assert found.fall.low > 0.5 and found.fall.verdict == "not certain"
    less = logged(tmp_path / "d.jsonl", 0.05, 1)
    [_, found] = compare([tenth, less]).runs
    assert found.fall.high < 0.5 and found.fall.verdict == "not certain"
    # Beyond what the logging can do, or logged alike, it is certain.
    steadier = logged(tmp_path / "c.jsonl", 0.02, 10)
    for base in (each, tenth):
        assert compare([base, steadier]).runs[1].fall.verdict == "yes"


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0.9, 0.8, 0.95), "lower by 90% (80% to 95%)"),
        ((0.1, -0.2, 0.3), "lower by 10% (-20% to 30%)"),
        ((-0.1, -0.6, 0.2), "higher by 10% (-20% to 60%)"),
        ((-1.0, -3.0, -0.5), "higher by 100% (50% to 300%)"),
    ],
)
def test_an_interval_has_the_sign_of_its_words(ends, said):
    assert Fall(*ends, *ends[1:]).describe() == said
