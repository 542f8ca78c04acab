"""One process: nothing is exchanged, nothing is averaged."""

from __future__ import annotations

from accum_trainer.engine.base import Engine


class SingleEngine(Engine):
    """The contract as `base` has it; both `grad_sync` policies are the same here."""

    name = "single"
