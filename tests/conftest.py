"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os

import pytest

# Several processes share few cores: threads that wait for each other by spinning would slow down
# all. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach a hub, and tokenizers must not warn about forks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The longest files first (minutes each), so that two workers end together.
LONG = (
    "engine/test_contract",
    "test_docs",
    "end_to_end/test_engines",
    "test_verify",
    "test_gpu",
    "test_compile",
    "end_to_end/test_launch_files",
    "test_footprint",
    "end_to_end/test_launch",
    "end_to_end/test_independent",
    "end_to_end/test_demo",
    "end_to_end/test_cut",
    "end_to_end/test_two_machines",
    "end_to_end/test_train",
    "end_to_end/test_slurm",
    "end_to_end/test_resume",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = {f"tests/{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state in the class: a test that builds an Accelerator must not inherit
    another's."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def quick_collections():
    """Memory that ran out is freed with a collection, which would go through all that was imported
    each time."""
    gc.freeze()
    yield
    gc.unfreeze()
