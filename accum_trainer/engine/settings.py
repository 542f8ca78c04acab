"""`Settings`: choices of the user that hold for every engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accum_trainer.errors import ConfigError

ACCUMULATION_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Settings that every engine takes.

    Attributes:
        max_grad_norm: clip the averaged gradient to this 2-norm; None for no clipping.
        accumulation_dtype: the dtype gradients accumulate in, `float32` or `bfloat16`.
    """

    max_grad_norm: float | None = None
    accumulation_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm} must be above 0; give None for no clipping"
            )
        if self.accumulation_dtype not in ACCUMULATION_DTYPES:
            raise ConfigError(
                f"accumulation_dtype={self.accumulation_dtype!r} is not known; give one of "
                f"{', '.join(ACCUMULATION_DTYPES)}"
            )

    @property
    def gradient_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.accumulation_dtype)
        return dtype
