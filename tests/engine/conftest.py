"""Runs all cases once per engine; the tests read what they returned."""

from __future__ import annotations

import json

import pytest

from tests.launching import python, torchrun

ENGINES = {"single": 1, "ddp": 2}


@pytest.fixture(scope="session", params=list(ENGINES))
def engine_results(request, tmp_path_factory):
    """case name -> one result per rank, for one engine."""
    out = tmp_path_factory.mktemp(request.param)
    processes = ENGINES[request.param]
    run = (
        python("-m", "tests.engine.worker", out) if processes == 1 else torchrun(processes, "tests.engine.worker", out)
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return {name: [results[name] for results in ranks] for name in ranks[0]}


@pytest.fixture
def world_size(engine_results):
    return len(next(iter(engine_results.values())))


@pytest.fixture
def case(engine_results):
    """Look up a case: its result on every rank; fails with the case's own traceback where it raised."""

    def results(name):
        found = engine_results[name]
        for rank, result in enumerate(found):
            assert "traceback" not in result, f"rank {rank}: {result['traceback']}"
        return found

    return results
