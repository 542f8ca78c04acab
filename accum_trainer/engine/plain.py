"""A plain Accelerator as users write it, to run their own loops on: K is accelerate's to divide by,
nothing is ours.

What a prepared DataLoader does for `accumulate()`, saying which micro-batch is the last,
`MicroBatches` does for a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from accum_trainer.engine.base import Engine
from accum_trainer.engine.build import build_engine
from accum_trainer.errors import EngineError


def plain_engine(gradient_accumulation_steps: int, cpu: bool, mixed_precision: str) -> Engine:
    """An engine around `Accelerator(gradient_accumulation_steps=K)`, for one process or DDP.

    The scheduler that it prepares steps once per update, whatever the number of processes
    (`split_batches`): accelerate's default multiplies its steps by W, which is a convention of the
    schedule and no fault of the loop.

    Raises:
        EngineError: the launcher asks for another engine.
        ConfigError: the environment says another K.
    """
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        # without a GPU the processes find each other over gloo only where accelerate is told of the
        # CPU
        cpu = True
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        cpu=cpu,
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    engine = build_engine(
        gradient_accumulation_steps=gradient_accumulation_steps, accelerator=accelerator
    )
    if engine.name not in ("single", "ddp"):
        raise EngineError(
            f"a loop is checked on one process or on DDP, but the launcher asks for {engine.name}"
        )
    return engine


def start_update(engine: Engine) -> None:
    """Have accelerate count micro-batches from the start of a window."""
    engine.accelerator.step = 0
    engine.accelerator.gradient_state._set_sync_gradients(True)


class MicroBatches(list[Any]):
    """The micro-batches of one window on one process: a list that tells accelerate, as a prepared
    DataLoader would, which of them is the last while it is iterated."""

    def __init__(self, engine: Engine, batches: list[Any]) -> None:
        super().__init__(batches)
        self._gradient_state = engine.accelerator.gradient_state

    def __iter__(self) -> Iterator[Any]:
        place = _Place()
        self._gradient_state._add_dataloader(place)
        try:
            for index in range(len(self)):
                place.end_of_dataloader = index == len(self) - 1
                yield self[index]
        finally:
            self._gradient_state._remove_dataloader(place)


class _Place:
    """What accelerate reads of a loader that is being iterated."""

    end_of_dataloader = False
    remainder = -1
