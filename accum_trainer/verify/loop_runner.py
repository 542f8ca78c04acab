"""Run a user's loop on prepared objects and observe its updates.

An observation is facts only: the gradient that the optimizer stepped with, the number of steps, the
weights that differ between ranks. Whether they are right is decided in `loop_judge`.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch

from accum_trainer.engine.base import Engine
from accum_trainer.errors import LoopError
from accum_trainer.verify.big_batch import Gradient, pad
from accum_trainer.verify.loop_file import Loop
from accum_trainer.verify.loop_windows import LoopWindow
from accum_trainer.verify.plain_accelerate import MicroBatches, start_update
from accum_trainer.verify.shared_checks import unequal_names

_LR = 0.1


@dataclass(frozen=True)
class Observation:
    """One call of the loop, seen from outside.

    Attributes:
        start: weights before the call.
        gradient: the gradient of the last optimizer step, the mean over ranks if they differ; None
            without a step.
        unequal: parameters that differ between ranks afterwards.
        leftover: gradient that the call before left behind.
    """

    window: LoopWindow
    start: Gradient
    gradient: Gradient | None
    unequal: list[str]
    optimizer_steps: int
    scheduler_steps: int
    leftover: Gradient


class LoopRunner:
    """Calls the loop on prepared objects, each time from the same weights. Collective."""

    def __init__(self, loop: Loop, engine: Engine, model: torch.nn.Module) -> None:
        self._loop, self._engine = loop, engine
        self._sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=_LR)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._sgd, lambda update: 0.9**update)
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
        stepped: list[Gradient] = []
        handle = self._sgd.register_step_pre_hook(lambda *_: stepped.append(self._gradients()))
        before = self._schedule.last_epoch
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
            handle.remove()
        return Observation(
            window=window,
            start=self._start,
            gradient=self._mean_over_ranks(stepped[-1]) if stepped else None,
            unequal=unequal_names(engine, engine.full_weights(self.model)),
            optimizer_steps=len(stepped),
            scheduler_steps=self._schedule.last_epoch - before,
            leftover=leftover,
        )

    def _gradients(self) -> Gradient:
        named = self._engine.unwrap(self.model).named_parameters()
        return {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None}

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
            mean[name] = torch.stack(each).mean(0)
        return mean


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
