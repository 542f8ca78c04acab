"""Memory and traffic that `plan` predicts, against real processes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.footprint import CASES, estimate, launch, make_files, read

# As many as fit into a minute; benchmarks/footprint.py runs them all.
TESTED = [
    "single",
    "single, K=1",
    "single, bf16",
    "single, LoRA",
    "single, checkpointed",
    "ddp",
    "zero1, bf16",
    "zero2",
    "zero2, bf16, every",
    "fsdp2",
    "fsdp2, K=1",
    "fsdp2, whole",
    "zero3",
    "zero3, whole",
]
# ZeRO-3 fetches ahead as far as its limits let it, which is not followed parameter by parameter.
SENT = {"zero3": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("footprint")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return launch(folder, TESTED)


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.long
def test_estimate_is_what_happens(folder, measured, name):
    case, expected, found = CASES[name], estimate(folder, CASES[name]), measured[name]
    assert expected.total == pytest.approx(found.peak, rel=0.05)
    assert expected.traffic[case.grad_sync] == pytest.approx(
        found.sent, rel=SENT.get(case.engine, 0.001)
    )


KS = (1, 2, 16)


@pytest.fixture(scope="module")
def peaks(folder):
    names = {k: f"single, K={k}" for k in KS}
    found = launch(folder, list(names.values()))
    return {k: found[name].peak for k, name in names.items()}


@pytest.mark.long
def test_r22_peak_memory_does_not_depend_on_k(peaks):
    assert peaks[16] == pytest.approx(peaks[2], rel=0.01)


@pytest.mark.long
def test_r22_k_1_needs_one_gradient_less(folder, peaks):
    gradient = estimate(folder, CASES["single"]).gradients
    assert peaks[16] - gradient == pytest.approx(peaks[1], rel=0.01)


def test_the_measure_is_of_live_bytes():
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        kept = torch.empty(1_000_000, dtype=torch.uint8)
        with torch.profiler.record_function("here"):
            passing = torch.empty(3_000_000, dtype=torch.uint8)
            del passing
            another = torch.empty(2_000_000, dtype=torch.uint8)
        later = torch.empty(9_000_000, dtype=torch.uint8)
    found = read(recorded, "here", 1)
    assert found.peak == pytest.approx(4_000_000, rel=1e-3) and found.sent == 0
    assert kept.numel() + another.numel() + later.numel() == 12_000_000
