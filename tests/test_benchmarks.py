"""The benchmarks' claims that do not depend on a machine: what is exchanged, counted on real
processes."""

from __future__ import annotations

import pytest

from benchmarks.traffic import EVERY, ONCE, Case, launch
from tests.launching import python

# A Llama with untied embeddings and biases in its MLP, by hand; an adapter of rank 8 beside each of
# its seven matrices.
V, H, INNER, L, W = 257, 64, 171, 3, 2
ALL = 4 * (2 * V * H + L * (4 * H * H + 3 * H * INNER + 2 * INNER + H + 2 * H) + H)
ADAPTER = 4 * L * 8 * (4 * (H + H) + 3 * (H + INNER))
KS = (1, 2, 8)

OURS = [
    Case(engine, lora, ONCE, k) for engine in ("ddp", "zero2") for lora in (False, True) for k in KS
]
SHARDED = [
    Case(engine, lora, ONCE, k, ONCE)
    for engine in ("zero3", "fsdp2")
    for lora in (False, True)
    for k in (1, 8)
]
SHARDED += [Case(engine, False, ONCE, 8, EVERY) for engine in ("zero3", "fsdp2")]
PEERS = [Case("accelerate", False, ONCE, 8), Case("deepspeed2", False, ONCE, 8)]


@pytest.fixture(scope="module")
def traffic():
    return launch(OURS + SHARDED + PEERS)


@pytest.mark.parametrize("k", KS)
@pytest.mark.long
def test_traffic_of_ddp_is_the_gradient_once(traffic, k):
    found = traffic[Case("ddp", k=k)]
    assert found["gradients"] == {"bytes": ALL, "collectives": 1}
    assert found["weights"]["bytes"] == 0


@pytest.mark.parametrize("k", KS)
@pytest.mark.long
def test_traffic_of_lora_is_the_adapter_once(traffic, k):
    assert traffic[Case("ddp", lora=True, k=k)]["gradients"] == {"bytes": ADAPTER, "collectives": 1}
    assert traffic[Case("zero2", lora=True, k=k)]["gradients"] == {
        "bytes": ADAPTER,
        "collectives": 1,
    }


@pytest.mark.parametrize("k", KS)
@pytest.mark.long
def test_traffic_of_zero2_once_per_window_is_that_of_ddp(traffic, k):
    found = traffic[Case("zero2", k=k)]
    assert found["gradients"] == {"bytes": ALL, "collectives": 1}
    # And the weights that the other process has stepped, padded to a multiple of 2 W numbers.
    assert found["weights"] == {"bytes": ALL + -ALL % (4 * 2 * W), "collectives": 1}
    assert ALL % (4 * 2 * W) != 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.long
def test_traffic_of_weights_gathered_once_is_the_model_once_at_any_k(traffic, lora):
    """FSDP2 gathers each of L blocks and the rest, rows padded to a multiple of W (an odd V, an odd
    inner size, biases of it); ZeRO-3 gathers each parameter after the step, numbers padded."""
    whole = ALL + (ADAPTER if lora else 0)
    for engine in ("fsdp2", "zero3"):
        one, eight = (traffic[Case(engine, lora, ONCE, k, ONCE)]["weights"] for k in (1, 8))
        assert one == eight
        assert whole < one["bytes"] < 1.01 * whole
        assert engine != "fsdp2" or one["collectives"] == L + 1
    for engine, times in (("fsdp2", 14.5), ("zero3", 7.9)):
        assert traffic[Case(engine, False, ONCE, 8, EVERY)]["weights"]["bytes"] > times * ALL


@pytest.mark.long
def test_traffic_beside_the_gradient_is_a_few_numbers_at_any_k(traffic):
    """One exchange for what all ranks share after a window, the counts of the next and the eight
    sums of a measured window, and DeepSpeed's norm or DDP's buffers (16 rotary frequencies): 64
    numbers at most."""
    for engine in ("ddp", "zero2"):
        for lora in (False, True):
            beside = [traffic[Case(engine, lora, k=k)]["other"] for k in KS]
            assert beside[0] == beside[1] == beside[2]
            assert beside[0]["collectives"] == 2 and beside[0]["bytes"] <= 64 * 8


@pytest.mark.long
def test_traffic_of_the_peers(traffic):
    assert traffic[Case("accelerate", k=8)]["gradients"] == {"bytes": ALL, "collectives": 1}
    assert traffic[Case("deepspeed2", k=8)]["gradients"] == {"bytes": 8 * ALL, "collectives": 8}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.long
def test_a_checkpoint_in_parts_takes_no_more_memory_than_the_part_twice(engine):
    run = python("-m", "benchmarks.saving", "--engine", engine, "--millions", 20, "--pairs", 1)
    assert run.returncode == 0, run.stderr[-3000:]
    *_, whole, parts = run.stdout.strip().splitlines()
    assert whole.startswith("| whole, by one process | 1 | 1 |")
    assert float(parts.split("|")[-2]) <= 2.0


@pytest.mark.long
def test_r24_the_larger_batch_halves_the_variance_after_as_many_updates_and_samples():
    run = python("-m", "benchmarks.variance", "--seeds", 0, "--updates", 50)
    assert run.returncode == 0, run.stderr[-3000:]  # it fails unless every row says yes
    *_, updates, samples = run.stdout.strip().splitlines()
    assert "| 50 updates |" in updates and "| 1,600 samples |" in samples
