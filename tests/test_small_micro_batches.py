"""The note on micro-batches that leave a GPU waiting for its host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accum_trainer import BatchPlan
from accum_trainer.train.setup import note_on_small_micro_batches
from accum_trainer.window_plan import Cut

LENGTHS = np.array([100, 300])


def note(device: str = "cuda", b: int = 8, k: int = 16, cut: Cut | None = None) -> str | None:
    plan = BatchPlan(micro_batch_size=b, gradient_accumulation_steps=k)
    return note_on_small_micro_batches(torch.device(device), plan, cut or Cut(b), LENGTHS)


def test_it_names_the_command_that_keeps_the_effective_batch():
    found = note()
    assert found is not None and "8 samples has about 1,600 tokens" in found
    assert "--batch-size auto --global-batch-size 128 cuts the same effective batch" in found


@pytest.mark.parametrize(
    "options",
    [
        dict(device="cpu"),
        dict(b=32),
        dict(k=1),
        dict(cut=Cut(None, 8192)),
    ],
    ids=["on a CPU", "many tokens", "one micro-batch", "cut by tokens"],
)
def test_it_is_not_said(options):
    assert note(**options) is None
