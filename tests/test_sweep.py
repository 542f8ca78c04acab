"""The verdict of a sweep and the lengths of its branches, on made records."""

from __future__ import annotations

import numpy as np
import pytest

from accum_trainer.runs.sweep import common_end, updates_of
from accum_trainer.runs.sweep_verdict import judge


def made(size, samples, lost, rng, noise, rows):
    """Records of a branch whose loss is the rows' own plus what it loses, and its own noise."""
    return [
        {
            "effective_batch_size": size,
            "num_targets": 10 * size,
            "loss": 3 + rows[at : at + size].mean() + lost + noise * rng.randn() / size**0.5,
        }
        for at in range(0, samples, size)
    ]


def swept(lost, noise=0.02, samples=4096, seed=0):
    rng = np.random.RandomState(seed)
    rows = rng.randn(samples)  # a thousand times what a branch may lose
    records = {size: made(size, samples, loss, rng, noise, rows) for size, loss in lost.items()}
    return judge(records, sorted(lost))


def test_the_largest_batch_that_loses_nothing_is_found_below_the_noise_of_the_samples():
    verdict = swept({16: 0.0, 32: 0.001, 64: 0.003, 128: 0.05})
    assert [one.verdict for one in verdict.compared] == ["loses nothing"] * 3 + ["loses"]
    assert verdict.largest == 64
    assert verdict.compared[3].difference == pytest.approx(0.05, abs=0.01)
    assert verdict.describe()[-1] == (
        "64 is the largest effective batch that loses nothing per sample"
    )
    assert swept({16: 0.0, 32: -0.01}).describe()[-1].endswith("of those tried; try larger ones")
    assert "every larger effective batch loses" in swept({16: 0.0, 32: 0.1}).describe()[-1]


def test_what_the_noise_hides_is_not_decided():
    verdict = swept({16: 0.0, 64: 0.01}, noise=2.0)
    assert verdict.compared[1].verdict == "not decided"
    assert verdict.describe()[-1].endswith("64 is not decided: give more --samples")
    assert swept({16: 0.0, 64: 0.0}, samples=256) is None


def test_the_margin_holds_as_often_as_it_says():
    held = 0
    for seed in range(200):
        one = swept({16: 0.0, 32: 0.02}, samples=1024, seed=seed).compared[1]
        held += abs(one.difference - 0.02) <= one.margin
    assert 0.88 < held / 200 <= 1.0


@pytest.mark.parametrize("consumed", [0, 60, 99])
@pytest.mark.parametrize("wanted", [1, 40, 41, 100, 250])
def test_branches_end_at_one_sample_in_epochs_that_end_unevenly(consumed, wanted):
    sizes, length = [4, 6, 10], 101
    total = common_end(wanted, sizes, length, consumed)
    assert total >= wanted
    for size in sizes:
        seen, at = 0, consumed
        for _ in range(updates_of(total, size, length, consumed)):
            taken = min(size, length - at)
            seen, at = seen + taken, (at + taken) % length
        assert seen == total
