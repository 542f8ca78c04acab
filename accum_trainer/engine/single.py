"""One process: nothing is exchanged, nothing is averaged."""

from __future__ import annotations

from accelerate import Accelerator

from accum_trainer.engine.base import Engine


class SingleEngine(Engine):
    """The contract as `base` has it; both `grad_sync` policies are the same here."""

    name = "single"

    def __init__(self, accelerator: Accelerator, grad_sync: str) -> None:
        super().__init__(accelerator)
        self.grad_sync = "once-per-window" if grad_sync == "auto" else grad_sync

    @property
    def gradient_divisor(self) -> float:
        # Accelerator.backward divides by the K it was configured with; ours is 1 unless the user passed their own.
        return self.accelerator.gradient_accumulation_steps
