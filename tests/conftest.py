"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from pathlib import Path

import pytest

# Several processes share few cores: threads that wait for each other by spinning would slow down
# all. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach a hub, and tokenizers must not warn about forks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One ninja for all tests: a second version on the PATH cannot read the log of the first, and would
# compile DeepSpeed's extension again whenever they take turns.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# DeepSpeed compiles an extension once. In the user's cache, two clones would compile it in turn,
# and a build that was killed leaves a lock for which all later processes wait without end.
EXTENSIONS = Path(__file__).parents[1] / ".pytest_cache" / "torch_extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
if "PYTEST_XDIST_WORKER" not in os.environ:
    for lock in EXTENSIONS.glob("*/lock"):
        from accum_trainer.engine.zero_build import process_that_holds

        if process_that_holds(lock) is None:  # a suite beside this one may be building
            lock.unlink()

# The longest files first, so that two workers end together. Those that start DeepSpeed come when
# the first of them has compiled its extension.
LONG = (
    "engine/test_contract",
    "test_chaos",
    "end_to_end/test_train",
    "end_to_end/test_resume",
    "test_docs",
    "end_to_end/panel/test_set_up",
    "test_verify",
    "end_to_end/test_engines",
    "end_to_end/test_launch",
    "test_compile",
    "end_to_end/test_tasks",
    "test_footprint_measured",
    "end_to_end/test_launch_files",
    "end_to_end/test_cut",
    "end_to_end/panel/test_several_runs",
    "end_to_end/panel/test_watch",
    "end_to_end/test_keep_best",
    "end_to_end/test_demo",
    "end_to_end/test_hangs",
    "test_memory_over_time",
    "test_benchmarks",
    "test_gpu",
    "end_to_end/test_two_machines",
)
# The inner loop: arithmetic, windows, single and DDP, wrong input.
QUICK = (
    "test_batch_plan",
    "test_window_plan",
    "test_config",
    "test_sources",
    "test_accumulator",
    "test_norm",
    "test_structure",
    "engine/test_contract",
    "end_to_end/test_wrong_options",
    "end_to_end/test_wrong_input",
)
# The slowest of these files: many updates, grids, processes that read ahead.
NOT_QUICK = (
    "test_i36_",
    "test_i20_i25_i29_every_combination",
    "test_r55_every_cut_gives_the_same_gradient",
    "test_an_epoch_resumed_in_its_middle_sees_the_rest_of_it_or_is_refused",
)
BEGUN = time.monotonic()


def _file(item):
    return item.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")


def _is_quick(item):
    engine = getattr(getattr(item, "callspec", None), "params", {}).get("engine_results", "single")
    if item.name.startswith(NOT_QUICK):
        return False
    return _file(item) in QUICK and engine in ("single", "ddp")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    """Markers are set before `-m` is applied."""
    if _is_quick(item):
        item.add_marker(pytest.mark.quick)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(_file(item), len(LONG)))


def pytest_terminal_summary(terminalreporter):
    wall = time.monotonic() - BEGUN
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    terminalreporter.write_line(f"took {wall:.0f} s, {cpu:.0f} s of CPU")


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


@pytest.fixture
def small_chunks(monkeypatch):
    """The chunked loss in chunks of three targets of the tests' vocabulary."""
    from accum_trainer.losses import chunked
    from tests.reference import VOCABULARY

    monkeypatch.setattr(chunked, "CHUNK", 3 * VOCABULARY)
