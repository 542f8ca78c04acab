"""The arithmetic, against numbers a person can check by hand."""

from __future__ import annotations

import math

import pytest

from accum_trainer.batch_plan import BatchPlan, lr_factor, scale_lr, warmup_updates
from accum_trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "solved"),
    [
        (dict(micro_batch_size=4), (4, 1, 1, 4)),
        (dict(micro_batch_size=4, gradient_accumulation_steps=8), (4, 8, 1, 32)),
        (dict(micro_batch_size=4, gradient_accumulation_steps=8, world_size=2), (4, 8, 2, 64)),
        (dict(global_batch_size=64, micro_batch_size=4), (4, 16, 1, 64)),
        (dict(global_batch_size=64, micro_batch_size=4, world_size=2), (4, 8, 2, 64)),
        (dict(global_batch_size=64, gradient_accumulation_steps=8, world_size=2), (4, 8, 2, 64)),
        (
            dict(global_batch_size=64, micro_batch_size=4, gradient_accumulation_steps=8),
            (4, 8, 2, 64),
        ),
        (dict(global_batch_size=64), (64, 1, 1, 64)),
        (dict(global_batch_size=64, world_size=4), (16, 1, 4, 64)),
        (
            dict(
                global_batch_size=64,
                micro_batch_size=4,
                gradient_accumulation_steps=8,
                world_size=2,
            ),
            (4, 8, 2, 64),
        ),
    ],
)
def test_any_sufficient_subset_is_solved(given, solved):
    plan = BatchPlan(**given)
    assert (
        plan.micro_batch_size,
        plan.gradient_accumulation_steps,
        plan.world_size,
        plan.global_batch_size,
    ) == solved


def test_r11_description_shows_all_four_numbers():
    assert BatchPlan(4, 8, 2).describe() == "B 4 x K 8 x W 2 = effective batch 64"


@pytest.mark.parametrize(
    ("samples", "updates", "tail"), [(64, 2, 0), (65, 3, 1), (95, 3, 31), (5, 1, 5)]
)
def test_updates_and_tail_of_an_epoch(samples, updates, tail):
    plan = BatchPlan(4, 8, num_samples=samples)
    assert (plan.updates_per_epoch, plan.tail_samples) == (updates, tail)


@pytest.mark.parametrize(
    "name",
    [
        "micro_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "global_batch_size",
        "num_samples",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "two", True])
def test_r1_values_below_one_or_not_whole_are_named(name, value):
    given = {"micro_batch_size": 4, name: value}
    with pytest.raises(ConfigError, match=rf"{name}={value!r}"):
        BatchPlan(**given)


@pytest.mark.parametrize(
    ("given", "solved"),
    [
        (dict(global_batch_size=10, micro_batch_size=4), (4, 3, 1)),
        (dict(global_batch_size=10, micro_batch_size=4, world_size=2), (4, 2, 2)),
        (dict(global_batch_size=2, micro_batch_size=4, world_size=2), (4, 1, 2)),
        (dict(global_batch_size=63, world_size=4), (16, 1, 4)),
    ],
)
def test_a_batch_that_does_not_divide_keeps_its_size(given, solved):
    plan = BatchPlan(**given)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.world_size) == solved
    assert plan.global_batch_size == given["global_batch_size"] and not plan.is_whole
    product = solved[0] * solved[1] * solved[2]
    assert plan.describe().endswith(f"= {product}, effective batch {given['global_batch_size']}")
    assert plan.for_samples(given["global_batch_size"] + 1).updates_per_epoch == 2


def test_unreachable_batch_names_neighbours():
    with pytest.raises(ConfigError) as error:
        BatchPlan(global_batch_size=10, gradient_accumulation_steps=4, world_size=2)
    message = str(error.value)
    assert (
        "global_batch_size=10 is not a multiple of gradient_accumulation_steps=4 x world_size=2 = 8"
        in message
    )
    assert "use global_batch_size=8 or 16" in message


def test_unreachable_batch_never_suggests_zero():
    with pytest.raises(ConfigError, match="use global_batch_size=8, or give micro_batch_size"):
        BatchPlan(global_batch_size=2, gradient_accumulation_steps=4, world_size=2)


def test_contradiction_shows_the_numbers():
    with pytest.raises(
        ConfigError, match=r"global_batch_size=64 contradicts .*=4 x .*=8 x world_size=1 = 32"
    ):
        BatchPlan(4, 8, 1, 64)


def test_nothing_given_is_too_little():
    with pytest.raises(ConfigError, match="give one of them"):
        BatchPlan(gradient_accumulation_steps=8)


@pytest.mark.parametrize(
    ("warmup", "updates"),
    [("100", 100), (7, 7), ("0", 0), ("5%", 50), ("0.5ep", 20), ("0.01%", 1), ("2ep", 80)],
)
def test_r10_warmup_in_updates_ratio_and_epochs(warmup, updates):
    assert warmup_updates(warmup, total_updates=1000, updates_per_epoch=40) == updates


def test_r10_warmup_in_epochs_follows_k():
    """Half an epoch of 640 samples is 320 samples of warm-up, whatever K."""
    for k in (1, 2, 4, 8):
        plan = BatchPlan(4, k, num_samples=640)
        assert (
            warmup_updates("0.5ep", 10_000, plan.updates_per_epoch) * plan.global_batch_size == 320
        )


@pytest.mark.parametrize("warmup", ["-1", "ten", "120%", "1.5", "5 %%", "nan", "", "ep"])
def test_unreadable_warmup(warmup):
    with pytest.raises(ConfigError, match="is not a warm-up"):
        warmup_updates(warmup, 1000, 40)


def test_warmup_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup=30 is 30 updates, but the run has only 20"):
        warmup_updates("30", 20, 40)


def test_lr_scaling_by_hand():
    assert scale_lr(1e-3, "none", 64, None) == 1e-3
    assert scale_lr(1e-3, "linear", 64, 16) == pytest.approx(4e-3)
    assert scale_lr(1e-3, "sqrt", 64, 16) == pytest.approx(2e-3)
    with pytest.raises(ConfigError, match="lr_scaling=linear needs lr_base_batch_size"):
        scale_lr(1e-3, "linear", 64, None)


def test_schedules_by_hand():
    assert [lr_factor("constant", 3, 10)(u) for u in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor("linear", 0, 4)(u) for u in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = lr_factor("cosine", 0, 4)
    assert [cosine(u) for u in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert cosine(1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
