"""What `train` decides about cuts on a GPU, and says of them; as far as that needs no GPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from accum_trainer import BatchPlan
from accum_trainer.train.setup import note_on_small_micro_batches
from accum_trainer.window_plan import Cut
from tests.launching import torchrun

# --- a note on micro-batches that leave a GPU waiting for its host ---

LENGTHS = np.array([100, 300])


def note(device: str = "cuda", b: int = 8, k: int = 16, cut: Cut | None = None) -> str | None:
    plan = BatchPlan(micro_batch_size=b, gradient_accumulation_steps=k)
    return note_on_small_micro_batches(torch.device(device), plan, cut or Cut(b), LENGTHS)


def test_it_names_the_command_that_keeps_the_effective_batch():
    found = note()
    assert found is not None and "8 samples has about 1,600 tokens" in found
    assert "--batch-size auto --global-batch-size 128 cuts the same effective batch" in found


def test_packed_it_is_said_of_the_longest_samples():
    """16 of 128 samples of a window are of its longest: 8 x 300 tokens."""
    found = note(cut=Cut(8, packed=True))
    assert found is not None and "8 samples has about 2,400 tokens" in found
    assert note(b=16, cut=Cut(16, packed=True)) is None


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


# --- attention inside samples as one kernel ---


def test_ranks_on_unlike_gpus_decide_alike(tmp_path):
    """One alone that packed would wait in its proof for the others."""
    launched = torchrun(2, "tests.unlike_gpus", tmp_path, timeout=120)
    assert launched.returncode == 0, launched.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    one_has_it, all_have_it, attention_drops, text_drops = range(4)
    for decided in found:
        assert not decided[one_has_it] and decided[all_have_it]
        assert not decided[attention_drops] and not decided[text_drops]
