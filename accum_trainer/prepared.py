"""The user's optimizer and scheduler, which act once per window wherever the loop calls them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer.errors import AccumTrainerError, EngineError

logger = logging.getLogger(__name__)

_NO_CLOSURE = (
    "a closure would run the micro-batches again inside step(); optimizers that need one cannot "
    "accumulate"
)


class Waiting:
    """Calls that a loop made too early, kept until they may run; and the updates made.

    Attributes:
        for_micro_batch: run when the micro-batch in hand has ended: its gradient may not be reduced
            yet.
        for_window: run when the optimizer has stepped or skipped.
        num_updates: made by this object, without those of a state that was loaded.
    """

    def __init__(self) -> None:
        self.for_micro_batch: list[Callable[[], None]] = []
        self.for_window: list[Callable[[], None]] = []
        self.num_updates = 0

    def end_micro_batch(self) -> list[Callable[[], None]]:
        """Take the calls that wait for it."""
        ended, self.for_micro_batch = self.for_micro_batch, []
        return ended

    def end_window(self, stepped: bool = False) -> list[Callable[[], None]]:
        """Take the calls that wait for it."""
        self.num_updates += stepped
        ended, self.for_window = self.for_window, []
        return ended


def run_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


class PreparedOptimizer(torch.optim.Optimizer):
    """An optimizer that acts once per window; `Accumulator.prepare` returns it.

    `step()` after each micro-batch, as in an Accelerate loop, does nothing until the window's last
    one; then it clips, checks, steps and zeroes. It holds the user's optimizer and shares its state
    and parameter groups.
    """

    def __init__(self, accumulator: Any, accelerated: Any) -> None:
        # The base class must not run: this object owns no parameters.
        self._accumulator = accumulator
        self.accelerated = accelerated

    def __getattr__(self, name: str) -> Any:
        # Step hooks, and methods that some optimizers have, such as train() and eval().
        if name in ("accelerated", "optimizer"):  # of a copy in the making
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's own optimizer."""
        optimizer: torch.optim.Optimizer = self.accelerated.optimizer
        return optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Finish the window if its last micro-batch is done; else nothing."""
        if closure is not None:
            raise EngineError(_NO_CLOSURE)
        window = self._accumulator.window
        if window is not None and window.is_running:
            self._accumulator.waiting.for_micro_batch.append(self.step)
            return
        if window is not None and window.is_complete:
            self._accumulator.step(self)
        elif window is None and self._accumulator.last_optimizer not in (None, self):
            raise AccumTrainerError(
                "another optimizer has finished this window: a window is one update of one "
                "optimizer, and this one would never step. Put all parameters into one optimizer, "
                "as parameter groups"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero between windows only: inside one, the gradient is still being accumulated."""
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
    """A scheduler that steps once per update; `Accumulator.prepare` returns it."""

    def __init__(self, accumulator: Any, scheduler: Any) -> None:
        self._accumulator = accumulator
        self.scheduler = scheduler
        self._stepped_for = accumulator.waiting.num_updates
        self._has_warned = False

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the user's scheduler if there was an update since the last step; else nothing."""
        window, waiting = self._accumulator.window, self._accumulator.waiting
        if window is not None and (window.is_running or window.is_complete):
            # If it is complete, optimizer.step() has yet to be called.
            waits_for = waiting.for_micro_batch if window.is_running else waiting.for_window
            waits_for.append(lambda: self.step(*args, **kwargs))
            return
        if waiting.num_updates != self._stepped_for:
            self._stepped_for = waiting.num_updates
            self.scheduler.step(*args, **kwargs)
        elif window is None and self._accumulator.last_update is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "scheduler.step() does nothing before the first update: the scheduler that "
                "acc.prepare() returned steps once per update. To continue a schedule, load its "
                "state, or call scheduler.scheduler.step() for each update that was made"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)
        self._stepped_for = self._accumulator.waiting.num_updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)


def _refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise an EngineError for an optimizer whose step() needs a closure, such as LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise EngineError(f"{type(optimizer).__name__} needs a closure, and {_NO_CLOSURE}")


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
    for optimizer in optimizers:
        _refuse_closure(optimizer)
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
