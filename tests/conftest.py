"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os

import pytest

# Nothing here may reach a hub, and tokenizers must not warn about forks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state in the class: a test that builds an Accelerator must not inherit another's."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def quick_collections():
    """Memory that ran out is freed with a collection, which would go through all that was imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()
