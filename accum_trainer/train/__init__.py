"""Training: one record per optimizer update.

    from accum_trainer.train import updates

    for record in updates(TrainConfig(model="tiny", steps=100)):
        print(record["step"], record["loss"])

The same loop runs under `accum-trainer train`, `accelerate launch -m accum_trainer.train`,
`torchrun -m` and `python -m`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accum_trainer.train.loop import Run as Run
    from accum_trainer.train.loop import updates as updates

__all__ = ["Run", "updates"]


def __getattr__(name: str) -> Any:  # lazily: the parts of this room do not need the whole
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from accum_trainer.train.loop import Run, updates

    return {"updates": updates, "Run": Run}[name]
