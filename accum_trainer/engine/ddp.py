"""DistributedDataParallel: gradients are averaged over ranks, once per window unless asked otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

from accum_trainer.engine.base import Engine
from accum_trainer.errors import EngineError


class DDPEngine(Engine):
    """Under `once-per-window` ranks may hold different numbers of micro-batches: only the last of each is exchanged."""

    name = "ddp"

    def __init__(self, accelerator: Accelerator, grad_sync: str) -> None:
        super().__init__(accelerator)
        self.grad_sync = "once-per-window" if grad_sync == "auto" else grad_sync
        self.equal_micro_batches = self.grad_sync == "every-microbatch"

    @property
    def gradient_divisor(self) -> float:
        # DDP averages over ranks; Accelerator.backward divides by the K it was configured with.
        return self.world_size * self.accelerator.gradient_accumulation_steps

    @contextlib.contextmanager
    def _sync(self, models: Sequence[torch.nn.Module], exchange: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for model in models:
                if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
                    raise EngineError(
                        f"accumulate() got a {type(model).__name__} that is not distributed, so its gradients would never be "
                        f"averaged over the {self.world_size} processes; pass the model that prepare() returned"
                    )
                if not exchange:
                    stack.enter_context(model.no_sync())
            yield
