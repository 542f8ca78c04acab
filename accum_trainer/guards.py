"""Watches over a loop: find what would make an update wrong, before it does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from accum_trainer.batch import version_of
from accum_trainer.errors import AccumTrainerError, ConfigError, EngineError

# Gradients whose versions are compared; clipping changes all of them.
_NUM_WATCHED = 4


def refuse_schedulers(accelerator: Any, world_size: int) -> None:
    """Raise a ConfigError for a scheduler that accelerate prepared and steps once per process."""
    for scheduler in accelerator._schedulers:  # noqa: SLF001 - accelerate has no public name
        by_process = scheduler.step_with_optimizer and not scheduler.split_batches
        if world_size > 1 and by_process:
            raise ConfigError(
                f"accelerate steps the scheduler it prepared {world_size} times per update, once "
                "per process; prepare the scheduler with acc.prepare(), or leave it unprepared and "
                "step it after each update"
            )


class ScheduleWatch:
    """Finds a scheduler that steps per micro-batch: one that `prepare` did not return.

    torch's optimizers do not know their schedulers, but these know their optimizer: they are looked
    for among the referrers of the user's optimizer and of the prepared one. That takes a tenth of a
    second, so it is done when a scheduler has left its mark in the parameter groups, and in epochs
    1, 2, 4, 8 and so on. A learning rate set by hand is seen by its value.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, prepared: torch.optim.Optimizer) -> None:
        self._optimizer, self._prepared = optimizer, prepared
        self._schedulers: list[weakref.ReferenceType[Any]] = []
        self._before: dict[Any, Any] = {}
        self._num_epochs = 0
        self._was_marked = False

    def note(self, is_new_epoch: bool) -> None:
        """Remember learning rates and schedulers' steps, as a window's first micro-batch begins."""
        self._num_epochs += is_new_epoch
        is_power_of_two = self._num_epochs & (self._num_epochs - 1) == 0
        # LRScheduler writes this key; ReduceLROnPlateau does not.
        is_marked = any("initial_lr" in group for group in self._optimizer.param_groups)
        if (is_new_epoch and is_power_of_two) or is_marked != self._was_marked:
            found = _schedulers_of(self._optimizer, self._prepared)
            self._schedulers = [weakref.ref(scheduler) for scheduler in found]
            self._was_marked = is_marked
        self._before = self._state()

    def check(self) -> None:
        """Raise an AccumTrainerError if they are not as they were noted."""
        now = self._state()
        # One that is gone by now has not stepped.
        if any(now.get(key, value) != value for key, value in self._before.items()):
            raise AccumTrainerError(
                "the learning rate was stepped between two micro-batches of one window: a "
                "scheduler that acc.prepare() did not return steps per micro-batch, K times per "
                "update. Prepare it (model, optimizer, scheduler = acc.prepare(...)), or step it "
                "once after each window"
            )

    def _state(self) -> dict[Any, Any]:
        """Each scheduler's steps, and each group's learning rate."""
        schedulers = [found() for found in self._schedulers]
        steps = {
            # A ChainedScheduler has none; those that it chains are watched, too.
            id(scheduler): getattr(scheduler, "last_epoch", None)
            for scheduler in schedulers
            if scheduler is not None
        }
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        # A tensor's value waits for the device; its version tells that it was written to.
        written = [version_of(r) if isinstance(r, torch.Tensor) else r for r in rates]
        return steps | {("lr", index): rate for index, rate in enumerate(written)}


def _schedulers_of(*optimizers: torch.optim.Optimizer) -> list[Any]:
    # Depending on the Python version an object's own dictionary stands between the two.
    referrers = gc.get_referrers(*optimizers)
    owners = gc.get_referrers(*(r for r in referrers if isinstance(r, dict)))
    kinds, known = (LRScheduler, ReduceLROnPlateau), set(map(id, optimizers))
    found = {
        id(thing): thing
        for thing in (*referrers, *owners)
        if isinstance(thing, kinds) and id(getattr(thing, "optimizer", None)) in known
    }
    return list(found.values())


class GradientWatch:
    """Finds a loop that changes or drops gradients between two micro-batches of a window.

    A gradient changed in place has another version, which costs nothing to read. torch does not
    count changes of sharded ones by its multi-tensor operations, which clipping uses.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[torch.nn.Parameter, torch.Tensor, int]] = []

    def note(self, models: Iterable[torch.nn.Module]) -> None:
        """Remember a few gradients, after a backward."""
        parameters = (p for model in models for p in model.parameters())
        held = ((p, p.grad) for p in parameters if p.grad is not None)
        self._seen = [(p, g, version_of(g)) for p, g in islice(held, _NUM_WATCHED)]

    def check(self) -> None:
        """Raise an AccumTrainerError if one is not as it was, before the next micro-batch."""
        if any(parameter.grad is None for parameter, *_ in self._seen):
            raise AccumTrainerError(
                "the gradient was dropped between two micro-batches of one window, so only a part "
                "of the sum would be left. Call zero_grad() of the optimizer that acc.prepare() "
                "returned, which waits for the window's end, or call no zero_grad(): each window "
                "starts from no gradient"
            )
        if any(p.grad is not g or version_of(g) != version for p, g, version in self._seen):
            raise AccumTrainerError(
                "the gradient was changed between two micro-batches of one window, so clipping or "
                "scaling acts on a part of the sum. Pass Accumulator(max_grad_norm=...), or change "
                "it after the last micro-batch only (if acc.accelerator.sync_gradients)"
            )

    def forget(self) -> None:
        """Begin another window."""
        self._seen = []


class TrainedWatch:
    """Finds parameters that were frozen or unfrozen after `prepare`."""

    def __init__(self) -> None:
        self._trained: list[tuple[torch.nn.Module, str, torch.nn.Parameter, bool]] = []

    def note(self, models: Sequence[torch.nn.Module]) -> None:
        """Remember which parameters of prepared models are trained."""
        self._trained += [
            (model, name, p, p.requires_grad)
            for model in models
            for name, p in model.named_parameters()
        ]

    def check(self, engine: Any, models: Sequence[torch.nn.Module] | None = None) -> None:
        """Raise an EngineError if that has changed in `models` and the engine cannot follow.

        Args:
            engine: in force.
            models: that a window trains; others may be frozen meanwhile, as a discriminator while
                its generator is trained. None if it is not known yet, which matters if there are
                several.
        """
        if engine.can_change_trained:
            return
        used = {model for model, *_ in self._trained} if models is None else set(models)
        if models is None and len(used) > 1:
            return
        for model, name, parameter, was_trained in self._trained:
            if model not in used:
                continue
            if parameter.requires_grad != was_trained:
                now, before = ("frozen", "trained") if was_trained else ("trained", "frozen")
                raise EngineError(
                    f"{name} is {now} now and was {before} when acc.prepare() got the model; "
                    f"{engine.name} reduces the gradients of the parameters that were trained "
                    "then. Freeze or unfreeze before acc.prepare(), or use FSDP2"
                )


class LoopGuard:
    """All watches of one accumulator."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._gradients, self._trained = GradientWatch(), TrainedWatch()
        self._schedules: list[ScheduleWatch] = []
        self._reader: Any = None  # of the epoch in progress

    def watch(self, models: Sequence[torch.nn.Module], optimizers: Sequence[Any]) -> None:
        """Watch what `prepare` returned."""
        self._trained.note(models)
        self._schedules += [ScheduleWatch(o.optimizer, o) for o in optimizers]

    def before_window(self) -> None:
        """Raise an EngineError or ConfigError for what would make the next window wrong."""
        self._gradients.forget()
        self._trained.check(self._engine)
        refuse_schedulers(self._engine.accelerator, self._engine.world_size)
        is_reduced_late = self._engine.defer_grad_reduction and self._engine.world_size > 1
        if is_reduced_late and not self._schedules:
            raise EngineError(
                "gradients are reduced after the last backward, so that it can run again if memory "
                "runs out, and an optimizer of accelerate may step before that; prepare it with "
                "acc.prepare(), or set recover_from_oom='never'"
            )

    def before_micro_batch(self, window: Any, models: Sequence[torch.nn.Module]) -> None:
        """Raise an AccumTrainerError for what happened since the micro-batch before.

        Raises:
            EngineError: at a window's first one, as `TrainedWatch.check`.
        """
        is_new_epoch, self._reader = window.reader is not self._reader, window.reader
        if window.micro_batch.is_first:
            self._trained.check(self._engine, models)
            for schedule in self._schedules:
                schedule.note(is_new_epoch)
            return
        if not self._schedules:
            refuse_unprepared(self._engine, None)
        for schedule in self._schedules:
            schedule.check()
        self._gradients.check()

    def after_failure(self) -> None:
        """A backward that ran out of memory may have added a part of its gradient."""
        self._gradients.forget()

    def after_micro_batch(self, window: Any, models: Iterable[torch.nn.Module]) -> None:
        """Remember the gradients so far; after the last micro-batch a loop may change them."""
        if window.micro_batch.is_last:
            self._gradients.forget()
        else:
            self._gradients.note(models)


def refuse_unprepared(engine: Any, max_grad_norm: float | None) -> None:
    """Raise for a loop whose optimizer `Accumulator.prepare` did not return.

    Raises:
        AccumTrainerError: accelerate did not prepare it either.
        ConfigError: it is to be clipped, which only a prepared optimizer can be.
    """
    if not engine.prepared_optimizers():
        raise AccumTrainerError(
            "no optimizer was prepared, so an optimizer.step() after each micro-batch acts K "
            "times per update; write model, optimizer = acc.prepare(model, optimizer)"
        )
    if max_grad_norm is not None:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm} is applied by acc.step() or "
            "an optimizer that acc.prepare() returned; prepare the optimizer with "
            "acc.prepare(), or leave max_grad_norm out and clip yourself"
        )
