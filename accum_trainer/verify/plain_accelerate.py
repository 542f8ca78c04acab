"""A plain Accelerator, as users write it, to run their own loops on: accelerate divides by K.

`start_update` and `MicroBatches` do for a list of micro-batches what a prepared DataLoader does for
`accumulate()`: they start the count of micro-batches and mark the last one. Knows no check; the
engine around the Accelerator only serves whole weights and the exchange of objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import DataLoaderConfiguration

from accum_trainer.engine.base import Engine
from accum_trainer.engine.build import build_engine
from accum_trainer.errors import EngineError


def plain_engine(gradient_accumulation_steps: int, cpu: bool, mixed_precision: str) -> Engine:
    """An engine around `Accelerator(gradient_accumulation_steps=K)`, for one process or DDP.

    The scheduler it prepares steps once per update for any number of processes (`split_batches`).
    accelerate's default multiplies the steps by W: a convention of the schedule, no fault of the
    loop.

    Raises:
        EngineError: the launcher asks for an engine that does not run plain loops.
        ConfigError: the environment sets another K.
    """
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        cpu = True  # without a GPU, accelerate starts gloo only if cpu=True is given
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        cpu=cpu,
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    engine = build_engine(
        gradient_accumulation_steps=gradient_accumulation_steps, accelerator=accelerator
    )
    if not engine.runs_plain_loops:
        raise EngineError(
            f"a loop is checked on one process or on DDP, but the launcher asks for {engine.name}"
        )
    return engine


def start_update(engine: Engine) -> None:
    """Let accelerate count micro-batches from the start of a window."""
    engine.accelerator.step = 0
    engine.accelerator.sync_gradients = True


class MicroBatches(list[Any]):
    """The micro-batches of one window on one process. While it is iterated, accelerate knows which
    of them is the last, as with a prepared DataLoader."""

    def __init__(self, engine: Engine, batches: list[Any]) -> None:
        super().__init__(batches)
        self._gradient_state = engine.accelerator.gradient_state

    def __iter__(self) -> Iterator[Any]:
        iteration = _Iteration(self._gradient_state)
        iteration.begin()
        try:
            for index in range(len(self)):
                iteration.end_of_dataloader = index == len(self) - 1
                yield self[index]
        finally:
            iteration.end()


class _Iteration(DataLoaderStateMixin):
    """The state that accelerate reads of a loader during iteration. Not the list itself, because
    accelerate compares loaders with `!=`."""

    def __init__(self, gradient_state: GradientState) -> None:
        self.gradient_state = gradient_state
