"""The user's optimizer and scheduler, acting once per window wherever the loop calls them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from accum_trainer.errors import AccumTrainerError, ConfigError, EngineError


class PreparedOptimizer(torch.optim.Optimizer):
    """An optimizer that acts once per window: what `Accumulator.prepare` returns.

    `step()` after each micro-batch, as in an Accelerate loop, does nothing until the window's last
    one; then it clips, checks, steps and zeroes. It holds the user's optimizer and shares its state
    and parameter groups.
    """

    def __init__(
        self, accumulator: Any, accelerated: Any
    ) -> None:  # the base class must not run: it owns nothing
        self._accumulator = accumulator
        self.accelerated = accelerated
        self._schedule = ScheduleWatch(self.optimizer)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's own optimizer."""
        return self.accelerated.optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    def watch_schedule(self, is_first: bool) -> None:
        """Raise an AccumTrainerError if the learning rate was stepped since the window's first
        micro-batch."""
        if is_first:
            self._schedule.note()
        else:
            self._schedule.check()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Finish the window if its last micro-batch is done; else nothing."""
        if closure is not None:
            raise EngineError(
                "a closure would run the micro-batches again inside step(); optimizers that need "
                "one cannot accumulate"
            )
        window = self._accumulator.window
        if window is not None and window.is_complete:
            self._accumulator.step(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing inside a window, whose gradient is still being made; `step` zeroes at its end."""
        if self._accumulator.window is None:
            self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"PreparedOptimizer({self.optimizer!r})"


class PreparedScheduler:
    """A scheduler that steps once per update that happened, wherever `step()` is called: what
    `prepare` returns."""

    def __init__(self, accumulator: Any, scheduler: Any) -> None:
        self._accumulator = accumulator
        self.scheduler = scheduler
        self._stepped_for = accumulator.num_updates

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the user's scheduler if there was an update since the last step; else nothing."""
        if self._accumulator.num_updates != self._stepped_for:
            self._stepped_for = self._accumulator.num_updates
            self.scheduler.step(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)
        self._stepped_for = self._accumulator.num_updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)


def refuse_schedulers(accelerator: Any, world_size: int) -> None:
    """Raise a ConfigError for a scheduler that accelerate prepared and steps once per process."""
    for scheduler in accelerator._schedulers:
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
    for among its referrers, once. A learning rate set by hand is seen by its value.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._schedulers: list[weakref.ReferenceType[Any]] | None = None
        self._before: dict[Any, Any] = {}

    def note(self) -> None:
        """Remember the learning rates and the schedulers' steps, as a window's first micro-batch
        begins."""
        if self._schedulers is None:
            self._schedulers = [weakref.ref(found) for found in _schedulers_of(self._optimizer)]
        self._before = self._state()

    def check(self) -> None:
        """Raise an AccumTrainerError if they are not as they were noted."""
        now = self._state()
        # One that is gone by now has not stepped.
        if any(now.get(key, value) != value for key, value in self._before.items()):
            raise AccumTrainerError(
                "the learning rate was stepped between two micro-batches of one window: a "
                "scheduler "
                "that acc.prepare() did not return steps per micro-batch, K times per update. "
                "Prepare it (model, optimizer, scheduler = acc.prepare(...)), or step it once "
                "after "
                "each window"
            )

    def _state(self) -> dict[Any, Any]:
        """Each scheduler's steps, and each group's learning rate."""
        schedulers = [found() for found in self._schedulers or []]
        steps = {
            id(scheduler): scheduler.last_epoch for scheduler in schedulers if scheduler is not None
        }
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        # A tensor's value waits for the device; its version tells that it was written to.
        written = [r._version if isinstance(r, torch.Tensor) else r for r in rates]
        return steps | {("lr", index): rate for index, rate in enumerate(written)}


def _schedulers_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    # Depending on the Python version an object's own dictionary stands between the two.
    referrers = gc.get_referrers(optimizer)
    owners = gc.get_referrers(*(r for r in referrers if isinstance(r, dict)))
    kinds = (LRScheduler, ReduceLROnPlateau)
    found = {
        id(thing): thing
        for thing in (*referrers, *owners)
        if isinstance(thing, kinds) and getattr(thing, "optimizer", None) is optimizer
    }
    return list(found.values())


def prepare_all(
    accumulator: Any, objects: Sequence[Any]
) -> tuple[tuple[Any, ...], list[PreparedOptimizer], list[torch.nn.Module]]:
    """Prepare what `Accumulator.prepare` got, with the accumulator's engine.

    Returns:
        The prepared objects in their order; among them the new optimizers; and the models.

    Raises:
        EngineError: an object that cannot be prepared.
    """
    models = [thing for thing in objects if isinstance(thing, torch.nn.Module)]
    optimizers = [
        thing
        for thing in objects
        if isinstance(thing, torch.optim.Optimizer) and not isinstance(thing, PreparedOptimizer)
    ]
    ready_models, accelerated = accumulator.engine.prepare(models, optimizers)
    ready_optimizers = [PreparedOptimizer(accumulator, optimizer) for optimizer in accelerated]
    both = zip([*models, *optimizers], [*ready_models, *ready_optimizers], strict=True)
    ready = {id(thing): prepared for thing, prepared in both}
    in_order = tuple(
        ready[id(thing)] if id(thing) in ready else _prepare_other(accumulator, thing)
        for thing in objects
    )
    return in_order, ready_optimizers, ready_models


def _prepare_other(accumulator: Any, thing: Any) -> Any:
    if isinstance(thing, (PreparedOptimizer, PreparedScheduler, DataLoader)):
        return thing
    if hasattr(thing, "step") and hasattr(thing, "state_dict"):
        return PreparedScheduler(accumulator, thing)
    raise EngineError(
        f"prepare() got a {type(thing).__name__}; it takes a model, an optimizer, a scheduler or a "
        "DataLoader"
    )
