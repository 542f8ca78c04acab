"""Fixtures that all tests share."""

from __future__ import annotations

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
