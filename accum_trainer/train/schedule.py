"""The numbers of a training's schedule: batch plan, updates, warm-up, learning rate. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accum_trainer.batch_plan import (
    BatchPlan,
    lr_factor,
    parse_shard,
    samples_of_shard,
    scale_lr,
    warmup_updates,
)
from accum_trainer.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Updates and learning rate of a whole run.

    Attributes:
        plan: the batch plan, with the samples that this run trains on in an epoch.
        shard: this run's share of each epoch, (index, count).
        total_updates: updates of the whole run if none is skipped.
        warmup: updates of warm-up.
        peak_lr: the learning rate after scaling.
        shape: the scheduler's name.
    """

    plan: BatchPlan
    shard: tuple[int, int]
    total_updates: int
    warmup: int
    peak_lr: float
    shape: str

    @property
    def lr_factor(self) -> Callable[[int], float]:
        """Updates done to the next learning rate, as a fraction of `peak_lr`."""
        return lr_factor(self.shape, self.warmup, self.total_updates)


def make_schedule(config: TrainConfig, plan: BatchPlan, num_samples: int) -> Schedule:
    """The schedule that `config` asks for on `num_samples` samples.

    Raises:
        ConfigError: an empty share, or a warm-up longer than the run.
    """
    plan = plan.for_samples(samples_of_shard(num_samples, config.shard))
    per_epoch = plan.updates_per_epoch
    assert per_epoch is not None
    total = config.steps if config.steps is not None else per_epoch * (config.epochs or 1)
    warmup = warmup_updates(config.warmup, total, per_epoch)
    return Schedule(
        plan=plan,
        shard=parse_shard(config.shard),
        total_updates=total,
        warmup=warmup,
        peak_lr=scale_lr(
            config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size
        ),
        shape=config.scheduler,
    )
