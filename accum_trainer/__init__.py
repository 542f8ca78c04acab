"""Gradient accumulation that is exactly right: the effective batch is the unit of training.

The names below are loaded on first use, so that `import accum_trainer` costs nothing and never
imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from accum_trainer.accumulator import Accumulator
    from accum_trainer.batch_plan import BatchPlan
    from accum_trainer.config import TrainConfig
    from accum_trainer.errors import (
        AccumTrainerError,
        CheckpointError,
        ConfigError,
        DataError,
        EngineError,
    )
    from accum_trainer.losses.causal_lm import causal_lm_loss
    from accum_trainer.update import Update
    from accum_trainer.window import Window
    from accum_trainer.windows import Windows

_HOME = {
    "Accumulator": "accumulator",
    "Update": "update",
    "Window": "window",
    "Windows": "windows",
    "BatchPlan": "batch_plan",
    "TrainConfig": "config",
    "causal_lm_loss": "losses.causal_lm",
    "AccumTrainerError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "EngineError": "errors",
    "CheckpointError": "errors",
}

__all__ = [
    "AccumTrainerError",
    "Accumulator",
    "BatchPlan",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "TrainConfig",
    "Update",
    "Window",
    "Windows",
    "causal_lm_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'accum_trainer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"accum_trainer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
