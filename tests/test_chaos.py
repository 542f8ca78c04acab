"""Runs that are broken in random ways and continued: benchmarks/chaos.py, some trials of it."""

from __future__ import annotations

import re

import pytest

from benchmarks.chaos_faults import FAULTS, unavailable
from tests.launching import python

TRIALS = 15


@pytest.mark.parametrize(
    "kinds, trials",
    [
        (("single", "ddp"), TRIALS),
        pytest.param(("zero2", "fsdp2"), len(FAULTS), marks=pytest.mark.long),
    ],
)
def test_broken_runs_end_whole(kinds, trials):
    run = python(
        *("-m", "benchmarks.chaos", "--trials", trials, "--seed", "5", "--kinds", *kinds),
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    ended = re.findall(r"^\d+: (.+?), (\w+), (\w+), \d starts: whole$", run.stdout, re.MULTILINE)
    assert len(ended) == trials
    assert {fault for fault, *_ in ended} == {*FAULTS} - {*unavailable()}
    assert {kind for _, kind, _ in ended} == {*kinds}
    # A run that ended before its fault shows nothing.
    assert sum(met == "hit" for *_, met in ended) >= trials * 2 // 3
