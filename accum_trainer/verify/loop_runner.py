"""Run a user's loop on prepared objects and observe its updates.

An observation is facts only: the gradient that the optimizer stepped with, how the weights moved,
the number of steps, the weights that differ between ranks. Whether they are right is decided in
`loop_judge`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.engine.base import Engine
from accum_trainer.errors import LoopError
from accum_trainer.verify.big_batch import Gradient, pad
from accum_trainer.verify.loop_file import Loop
from accum_trainer.verify.loop_update import Update, measure_movement
from accum_trainer.verify.loop_windows import LoopWindow
from accum_trainer.verify.plain_accelerate import MicroBatches, start_update
from accum_trainer.verify.shared_checks import unequal_names

_LR, _LR_DECAY = 0.1, 0.9


def scheduled_rate(updates: int) -> float:
    """The learning rate of the update that follows `updates` others."""
    return _LR * _LR_DECAY**updates


@dataclass(frozen=True)
class Observation:
    """One call of the loop, seen from outside.

    Attributes:
        start: weights before the call.
        gradient: the gradient of the last optimizer step, the mean over ranks if they differ; None
            unless every rank stepped. Read when the step ends, so after its hooks and its closure.
        handed: the gradient when that step began, if a hook or closure changed it.
        update: how this rank's weights moved; None unless the optimizer stepped once, with a
            gradient that is finite and not 0.
        unequal: parameters that differ between ranks afterwards.
        optimizer_steps: of each rank.
        leftover: gradient that the call before left behind.
    """

    window: LoopWindow
    start: Gradient
    gradient: Gradient | None
    handed: Gradient | None
    update: Update | None
    unequal: list[str]
    optimizer_steps: list[int]
    scheduler_steps: int
    leftover: Gradient


class LoopRunner:
    """Calls the loop on prepared objects, each time from the same weights. Collective."""

    def __init__(self, loop: Loop, engine: Engine, model: torch.nn.Module) -> None:
        self._loop, self._engine = loop, engine
        self._sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=_LR)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._sgd, lambda update: _LR_DECAY**update
        )
        prepared = engine.accelerator.prepare(model, self._sgd, self._schedule)
        self.model, self._optimizer, self._scheduler = prepared
        self._start = {name: w.clone() for name, w in engine.full_weights(self.model).items()}

    def run(self, window: LoopWindow) -> Observation:
        """Call the loop on one window.

        Raises:
            LoopError: the loop raised.
        """
        engine = self._engine
        engine.load_full_weights(self.model, self._start)
        leftover = self._gradients()
        before = self._schedule.last_epoch
        steps = _StepWatch(self._sgd, self._schedule, self._gradients)
        start_update(engine)
        batches = [engine.to_device(pad(rows)) for rows in window.ranks[engine.rank]]
        try:
            self._loop(
                engine.accelerator,
                self.model,
                self._optimizer,
                self._scheduler,
                MicroBatches(engine, batches),
            )
        except Exception as error:  # the user's code may raise anything
            raise LoopError(_describe(error, self._loop, window.name)) from error
        finally:
            steps.stop()
        weights = engine.full_weights(self.model)
        # On all processes or on none: the means are collective.
        optimizer_steps = engine.gather_objects(steps.count)
        stepped = all(optimizer_steps)
        return Observation(
            window=window,
            start=self._start,
            gradient=self._mean_over_ranks(steps.gradient) if stepped else None,
            handed=self._handed(steps) if stepped else None,
            update=self._update(window, steps, before, weights),
            unequal=unequal_names(engine, weights),
            optimizer_steps=optimizer_steps,
            scheduler_steps=self._schedule.last_epoch - before,
            leftover=leftover,
        )

    def _handed(self, steps: _StepWatch) -> Gradient | None:
        changed = any(self._engine.gather_objects(not _equal(steps.handed, steps.gradient)))
        return self._mean_over_ranks(steps.handed) if changed else None

    def _update(
        self, window: LoopWindow, steps: _StepWatch, before: int, weights: Gradient
    ) -> Update | None:
        if steps.count != 1:
            return None
        # Parameters only: a forward may change buffers.
        names = [name for name, _ in self._engine.unwrap(self.model).named_parameters()]
        after = {name: weights[name] for name in names}
        movement = measure_movement(self._start, after, steps.gradient)
        if movement is None:
            return None
        return Update(
            window=window.name,
            movement=movement,
            updates_before=before,
            early_steps=steps.scheduled - before,
            scheduler_steps=self._schedule.last_epoch - before,
            rate_in_force=steps.rate,
        )

    def _gradients(self) -> Gradient:
        named = self._engine.unwrap(self.model).named_parameters()
        return {
            name: p.grad.detach().to("cpu", copy=True) for name, p in named if p.grad is not None
        }

    def _mean_over_ranks(self, gradient: Gradient) -> Gradient:
        """The ranks' mean. They are equal unless the exchange left out a parameter, and then the
        mean is what the exchange would have given."""
        if not unequal_names(self._engine, gradient):
            return gradient
        ranks = self._engine.gather_objects(gradient)
        mean = {}
        for name in {name for rank in ranks for name in rank}:
            like = next(rank[name] for rank in ranks if name in rank)
            each = [rank.get(name, torch.zeros_like(like)) for rank in ranks]
            mean[name] = torch.stack(each).double().mean(0)
        return mean


class _StepWatch:
    """Watches an optimizer until `stop`.

    Attributes:
        count: its steps.
        handed, gradient: the gradient when the last step began and when it ended.
        rate: the learning rate of the last step.
        scheduled: the scheduler's count at the last step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        gradients: Callable[[], Gradient],
    ) -> None:
        self._schedule, self._gradients = schedule, gradients
        self.count, self.rate, self.scheduled = 0, 0.0, 0
        self.handed: Gradient = {}
        self.gradient: Gradient = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._begins),
            optimizer.register_step_post_hook(self._ends),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begins(self, *_: Any) -> None:
        self.handed = self._gradients()

    def _ends(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.count += 1
        self.gradient = self._gradients()
        self.rate, self.scheduled = optimizer.param_groups[0]["lr"], self._schedule.last_epoch


def _equal(one: Gradient, other: Gradient) -> bool:
    return one.keys() == other.keys() and all(torch.equal(g, other[n]) for n, g in one.items())


def _describe(error: Exception, loop: Loop, window: str) -> str:
    """The line of the loop's own file that an exception came from, and its message."""
    file = getattr(getattr(loop, "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or frames
    message = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return (
        f"the loop raised in its {window}, at {own[-1].filename}:{own[-1].lineno}: "
        f"{type(error).__name__}: {message}; a loop must make one update of any window"
    )
