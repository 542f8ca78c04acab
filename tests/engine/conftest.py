"""Runs all cases once per engine; the tests read what they returned."""

from __future__ import annotations

import json
import os

import pytest

from tests.launching import python, torchrun

# name -> (processes, what the worker asks of the Accumulator)
ENGINES = {
    "single": (1, {}),
    "ddp": (2, {}),
    "zero0": (2, {"zero_stage": 0}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "fsdp2": (2, {"fsdp": True}),
}
# One engine instead, some of its cases, on another device (benchmarks/gpu/contract.py):
# {"engine": name, "processes": how many, "options": as above, "cases": names, "torchrun": for one
# process too}.
ONLY = json.loads(os.environ.get("ACCUM_TRAINER_CONTRACT", "null"))
if ONLY:
    ENGINES = {ONLY["engine"]: (ONLY["processes"], ONLY["options"])}


# Tests of cases that pass an Accelerator of their own, which runs single or DDP: not collected for
# the other engines.
OF_ACCELERATE = (
    "own_accelerator_with_k",
    "loader_sharded_by_accelerate",
    "test_i15_",
    "test_i46_",
    "under_a_scaler",
    "test_loop_of_accelerate",
)


def pytest_collection_modifyitems(config, items):
    def belongs(item):
        given = getattr(getattr(item, "callspec", None), "params", {})
        # The cases that a test looks up are named in it, or in its parameters.
        named = {*item.function.__code__.co_consts, *map(str, given.values())}
        if ONLY and not named & {*ONLY["cases"]}:
            return False
        engine = given.get("engine_results", "single")
        return engine in ("single", "ddp") or not any(name in item.name for name in OF_ACCELERATE)

    dropped = [item for item in items if not belongs(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if belongs(item)]


@pytest.fixture(scope="session", params=list(ENGINES))
def engine_results(request, tmp_path_factory):
    """case name -> one result per rank, for one engine."""
    out = tmp_path_factory.mktemp(request.param)
    processes, options = ENGINES[request.param]
    arguments = ("tests.engine.worker", out, json.dumps(options), *(ONLY["cases"] if ONLY else ()))
    alone = processes == 1 and not (ONLY and ONLY["torchrun"])
    run = python("-m", *arguments) if alone else torchrun(processes, *arguments)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return {name: [results[name] for results in ranks] for name in ranks[0]}


@pytest.fixture
def engine(request):
    return request.node.callspec.params["engine_results"]


@pytest.fixture
def world_size(engine_results):
    return len(next(iter(engine_results.values())))


@pytest.fixture
def case(engine_results):
    """Look up a case: its result on every rank; fails with the case's own traceback where it
    raised."""

    def results(name):
        found = engine_results[name]
        for rank, result in enumerate(found):
            assert "traceback" not in result, f"rank {rank}: {result['traceback']}"
        return found

    return results
