"""Memory that runs out inside a window: the window goes on in smaller parts, with the gradient it
would have had."""

from __future__ import annotations

import json
import logging
import weakref
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from accum_trainer import AccumTrainerError, Accumulator, EngineError, causal_lm_loss
from accum_trainer.batch import halve, num_samples
from accum_trainer.errors import ConfigError, DataError
from tests import recovering
from tests.engine.cases.probing import Slope
from tests.grids import thinned
from tests.launching import python, torchrun
from tests.recovering import LAST, POINTS, B, K, out_of_memory, train
from tests.reference import make_model, make_rows, pad

EXACT = 2e-6

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "quick_collections")


def assert_recovered(result, splits=None):
    assert all(error <= EXACT for error in result["errors"]), result["errors"]
    assert result["left"] == 0
    if splits is not None:
        assert [update[1] for update in result["updates"]] == splits


# --- one process ---


@pytest.mark.parametrize("number", range(K))
@pytest.mark.parametrize("point", POINTS)
def test_failure_anywhere_in_a_window(point, number):
    result = train({(0, number): point})
    in_forward = point in ("forward", "loss")
    # After a backward the window starts anew, and what was as large or larger is cut too.
    cut = 1 if in_forward or number == 0 else 2
    assert_recovered(result, [cut, 0])
    whole = [B] * K
    before, after = whole[: number + 1], whole[number + 1 :]
    if in_forward:
        again = [2, 2, *after]
    else:
        again = [2, 2, *([B] * (number - 1) if number else []), *([2, 2] if number else []), *after]
    assert result["given"][0] == before + again
    assert result["updates"][0] == [B * K, cut, K + cut, K + cut, K + cut]
    assert result["updates"][1] == [5, 0, 2, 2, 2]
    assert result["run"] == K + cut + 2


def test_undisturbed_windows_cost_nothing():
    for policy in ("never", "auto", "always"):
        result = train({}, recover_from_oom=policy)
        assert_recovered(result, [0, 0])
        assert result["given"][0] == [B] * K


def test_later_windows_do_not_fail_again():
    """What is as large as that which failed is cut before it is run."""
    result = train({(0, 0): "forward"}, whole_windows=2)
    assert_recovered(result)
    failed = result["given"][0]
    assert failed == [4, 2, 2, 4, 4]
    repeated = train({(0, 0): "forward", (0, 1): "forward"}, whole_windows=2)
    assert_recovered(repeated)
    # Two samples of the longest failed too: four of half their length are as many positions.
    assert repeated["given"][1][0] < B


def test_each_micro_batch_and_each_half_may_fail():
    result = train({(0, 0): "forward", (0, 1): "backward ends", (0, LAST): "loss"})
    assert_recovered(result)
    assert result["given"][0] == [4, 2, 1, 1, 1, 1, 4, 4, 2, 2]


def test_one_sample_cannot_be_cut():
    with pytest.raises(
        EngineError,
        match=r"a micro-batch of 1 sample\(s\), 38 positions, ran out of memory and cannot be",
    ):
        train({(0, number): "loss" for number in range(3)})


def test_switched_off_the_error_passes():
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        train({(0, 0): "forward"}, recover_from_oom="never")


def test_other_errors_pass():
    acc, model, _ = slope()
    window = next(iter(acc.windows([torch.ones(2)] * 2, count_targets=len)))
    with pytest.raises(RuntimeError, match="something else"):
        for _ in window:
            with acc.accumulate(model):
                raise RuntimeError("something else")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you "
            "tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
    ],
)
def test_what_libraries_say_when_memory_runs_out(error):
    acc, model, optimizer = slope()
    given = []
    for window in acc.windows(iter([torch.arange(4.0)]), count_targets=len):
        for x in window:
            given.append(x.tolist())
            with acc.accumulate(model):
                if len(x) == 4:
                    raise error
                acc.backward(model(x).sum(), reduction="sum")
        acc.step(optimizer)
    assert given == [[0, 1, 2, 3], [0, 1], [2, 3]]


def test_unknown_policy():
    with pytest.raises(
        ConfigError, match="recover_from_oom='yes' is not known; give one of auto, always, never"
    ):
        Accumulator(micro_batch_size=1, cpu=True, recover_from_oom="yes")


def slope(**options):
    acc = Accumulator(
        **({"micro_batch_size": 4, "gradient_accumulation_steps": 1, "cpu": True} | options)
    )
    model = Slope()
    return acc, *acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))


def test_it_is_told_and_counted(caplog):
    acc, model, optimizer = slope(gradient_accumulation_steps=2)
    window = next(iter(acc.windows(iter([torch.arange(4.0), torch.ones(2)]), count_targets=len)))
    with caplog.at_level(logging.WARNING):
        for x in window:
            with acc.accumulate(model):
                acc.backward(model(x).sum(), reduction="sum")
                if len(x) == 4:
                    out_of_memory()
    assert (
        "process 0: a micro-batch of 4 sample(s), 4 positions, ran out of memory; it is cut in two"
        in caplog.text
    )
    update = acc.step(optimizer)
    assert (update.num_splits, update.num_micro_batches, update.gradient_accumulation_steps) == (
        1,
        3,
        3,
    )
    assert (update.num_samples, update.num_targets) == (6, 6)
    assert model.w.item() == pytest.approx(-(0 + 1 + 2 + 3 + 1 + 1) / 6)


def test_a_term_that_is_a_mean_over_micro_batches_keeps_its_weight():
    """Loss w x and a term 10 w of each micro-batch: mean of x, and 10, whatever is cut."""
    acc, model, optimizer = slope(gradient_accumulation_steps=2)
    for window in acc.windows(iter([torch.arange(5.0), torch.ones(2)]), count_targets=len):
        for x in window:
            with acc.accumulate(model):
                acc.backward(
                    model(x).sum(), reduction="sum", auxiliary=10 * model(torch.ones(1)).sum()
                )
                if len(x) == 5:
                    out_of_memory()
        acc.step(optimizer)
    assert model.w.item() == pytest.approx(-((0 + 1 + 2 + 3 + 4 + 1 + 1) / 7 + 10))


def test_loop_of_micro_batches():
    """`optimizer.step()` after each micro-batch, also after one that failed."""
    acc, model, optimizer = slope(gradient_accumulation_steps=2)
    failed = []
    for x in acc.batches(iter([torch.arange(4.0), torch.arange(4.0, 8.0)]), count_targets=len):
        with acc.accumulate(model):
            acc.backward(model(x).mean(), reduction="mean")
            if len(x) == 4:
                failed.append(x)
                out_of_memory()
        optimizer.step()
        optimizer.zero_grad()
    assert len(failed) == 1  # the second is as large, and cut before it fails
    assert (acc.num_updates, acc.last_update.num_splits) == (1, 2)
    assert model.w.item() == pytest.approx(-3.5)


def test_loop_whose_optimizer_accelerate_prepared():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    acc = Accumulator(micro_batch_size=4, gradient_accumulation_steps=2, accelerator=accelerator)
    model = Slope()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weights = []
    for x in acc.batches(iter([torch.ones(2), torch.arange(4.0)]), count_targets=len):
        with acc.accumulate(model):
            if len(x) == 4:
                out_of_memory()
            acc.backward(model(x).sum(), reduction="sum")
        optimizer.step()
        optimizer.zero_grad()
        weights.append(model.w.item())
    # The attempt that failed was the window's last micro-batch, and steps nothing, although there
    # is a gradient.
    assert weights == [0, 0, 0, pytest.approx(-8 / 6)]


def test_second_accumulate_after_one_that_failed_is_an_error():
    """Its forward would add the whole micro-batch to halves that are run again."""
    acc, model, _ = slope()
    window = next(iter(acc.windows(iter([torch.arange(4.0)]), count_targets=len)))
    with pytest.raises(AccumTrainerError, match="outside a window"):
        for x in window:
            with acc.accumulate(model):
                out_of_memory()
            with acc.accumulate(model):
                acc.backward(model(x).sum(), reduction="sum")


def test_targets_that_do_not_add_up_are_refused():
    acc, model, _ = slope()
    window = next(
        iter(acc.windows(iter([torch.arange(4.0)]), count_targets=lambda batch: len(batch) ** 2))
    )
    with pytest.raises(
        EngineError, match="count_targets finds 16 targets in it, and 4 and 4 in its halves"
    ):
        for _ in window:
            with acc.accumulate(model):
                out_of_memory()


def test_half_with_targets_comes_last():
    acc, model, optimizer = slope()
    given = []
    for window in acc.windows(
        iter([torch.tensor([1.0, 2.0, -1.0, -2.0])]), count_targets=lambda x: int((x > 0).sum())
    ):
        for x in window:
            given.append(x.tolist())
            with acc.accumulate(model):
                acc.backward(model(x)[x > 0].mean(), reduction="mean")
                if len(x) == 4:
                    out_of_memory()
        acc.step(optimizer)
    assert given == [[1, 2, -1, -2], [-1, -2], [1, 2]]
    assert model.w.item() == -1.5


def test_a_failed_attempt_keeps_no_memory():
    """When its halves come, nothing of the attempt is alive: not what the forward made, not what a
    variable still names."""
    acc, model, _ = slope()
    kept = []

    def forward(x):
        activation = model(x) ** 2
        kept.append(weakref.ref(activation))
        if len(x) == 4:
            out_of_memory()
        return activation.sum()

    window = next(iter(acc.windows(iter([torch.arange(4.0)]), count_targets=len)))
    for x in window:
        assert all(activation() is None for activation in kept)
        with acc.accumulate(model):
            acc.backward(forward(x), reduction="sum")
    assert len(kept) == 3

    acc, model, _ = slope()
    window = next(iter(acc.windows(iter([torch.arange(4.0)]), count_targets=len)))
    for x in window:
        with acc.accumulate(model):
            loss = (
                model(x) ** 2
            ).sum()  # a variable of the loop, alive until the next loss is there
            if len(x) == 4:
                loss.register_hook(out_of_memory)
            acc.backward(loss, reduction="sum")
        assert len(x) < 4 or loss.grad_fn is None


def test_memory_that_really_runs_out():
    run = python("-m", "tests.exhausting")
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    assert result["given"][0] == 16 and result["given"][-1] < 16
    assert result["num_splits"] >= 1
    assert result["error"] <= EXACT


def test_the_trainer_records_it(tmp_path, monkeypatch):
    import accum_trainer.train.loop as module
    from accum_trainer import TrainConfig

    failed = []

    def loss(model, batch):
        if num_samples(batch) == 4 and not failed:
            failed.append(True)
            out_of_memory()
        return causal_lm_loss(model, batch)

    monkeypatch.setattr(module, "causal_lm_loss", loss)
    config = TrainConfig(
        steps=2,
        batch_size=4,
        gradient_accumulation_steps=2,
        cpu=True,
        output_dir=str(tmp_path / "run"),
    )
    records = list(module.updates(config))
    assert records[0]["oom_splits"] == 1
    assert (records[0]["num_micro_batches"], records[0]["gradient_accumulation_steps"]) == (3, 3)
    assert records[0]["effective_batch_size"] == 8


# --- halves ---


def test_halves_of_every_kind_of_batch():
    rows = make_rows(5)
    first, second = halve(pad(rows))
    assert [len(half["labels"]) for half in (first, second)] == [3, 2]
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), pad(rows)["input_ids"])

    Pair = namedtuple("Pair", "x y")
    first, second = halve(Pair(torch.arange(4), np.arange(4)))
    assert isinstance(first, Pair) and second.x.tolist() == [2, 3] and second.y.tolist() == [2, 3]

    batch = {
        "x": torch.arange(2),
        "names": ["a", "b"],
        "rate": torch.tensor(0.5),
        "mask": torch.ones(1, 7),
        "task": "qa",
    }
    first, second = halve(batch)
    assert (first["x"].tolist(), first["names"], second["names"]) == ([0], ["a"], ["b"])
    assert second["rate"] == 0.5 and second["mask"].shape == (1, 7) and second["task"] == "qa"
    assert batch["names"] == ["a", "b"]

    first, second = halve(SimpleNamespace(x=torch.arange(3), y=torch.arange(3)))
    assert (first.x.tolist(), second.y.tolist()) == ([0, 1], [2])


def test_halves_of_a_packed_row_are_cut_where_positions_begin_anew():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 5]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 7, 8, 9, -100, 6, -100]]),
    }
    first, second = halve(batch)
    assert first["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert second["position_ids"].tolist() == [[0, 1, 0]]
    assert causal_lm_targets_of(first) + causal_lm_targets_of(second) == causal_lm_targets_of(batch)
    with pytest.raises(DataError, match="it holds one sample"):
        halve(first)
    with pytest.raises(
        DataError, match=r"cu_seqlens of shape \(4,\) does not lie along the 8 positions"
    ):
        halve(batch | {"cu_seqlens": torch.tensor([0, 5, 7, 8])})


def causal_lm_targets_of(batch):
    from accum_trainer.losses.targets import causal_lm_targets

    return causal_lm_targets(batch)


def test_what_has_no_samples_along_its_first_dimension_is_not_cut():
    with pytest.raises(
        DataError, match=r"pixels of shape \(7, 3\) does not begin with the 4 samples"
    ):
        halve({"input_ids": torch.ones(4, 9), "pixels": torch.ones(7, 3)})
    with pytest.raises(DataError, match="it holds one sample"):
        halve(torch.ones(1, 3))


def test_packed_windows_recover():
    from accum_trainer.sources.collating import PackingCollator
    from accum_trainer.window_plan import Cut
    from tests.engine.cases.probing import Probe, lengths, planned
    from tests.reference import relative_error

    rows = make_rows(12)
    acc = Accumulator(micro_batch_size=4, global_batch_size=12, cpu=True)
    model = make_model("llama")
    model.config.use_cache = (
        False  # with a cache transformers does not look for restarting positions
    )
    probe = Probe(acc, model)
    exact = probe.exact(planned(rows, 12)[0])[1]
    cut = Cut(4, packed=True)
    for window in acc.windows(rows, collate_fn=PackingCollator(), lengths=lengths(rows), cut=cut):
        for number, batch in enumerate(window):
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
                if number == 1:
                    out_of_memory()
        found, made = len(window), probe.step()
    # In the memory of the four longest of twelve.
    assert (found, made.num_splits) == (2 + 2, 2)
    assert relative_error(probe.stepped[-1], exact) <= EXACT


def test_loader_of_tuples_recovers():
    acc, model, optimizer = slope(micro_batch_size=3, gradient_accumulation_steps=2)
    data = torch.utils.data.TensorDataset(torch.arange(6.0), torch.ones(6))
    for window in acc.windows(
        DataLoader(data, batch_size=3), count_targets=lambda batch: len(batch[0])
    ):
        for x, y in window:
            with acc.accumulate(model):
                acc.backward((model(x) * y).mean(), reduction="mean")
                if len(x) == 3:
                    out_of_memory()
        acc.step(optimizer)
    assert model.w.item() == pytest.approx(-2.5)


# --- two processes ---


@pytest.fixture(scope="module")
def on_two(request, tmp_path_factory):
    """case -> what it returned on each rank; all in one launch."""
    out = tmp_path_factory.mktemp("recovered")
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    left_out = {"one_rank_alone_is_refused", *LONG} - {spec.params.get("name") for spec in specs}
    names = [name for name in recovering.CASES if name not in left_out]
    run = torchrun(2, "tests.recovering", out, *names)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [results[name] for results in ranks] for name in names}


RUNS = {
    "undisturbed": 3,
    "ddp_always": len(POINTS) * K,
    "ddp_always_on_all": len(POINTS) * K * 3,
    "ddp_auto": len(POINTS) * (K - 1) * 2 + 1,
    "ddp_again_and_again": 1,
    "ddp_with_unused_parameters": len(POINTS),
    "zero1": len(POINTS) * (K - 2) + 1 + len(POINTS),
    "zero2": len(POINTS) * (K - 1),
}


LONG = ["ddp_always_on_all"]  # `ddp_always` on each choice of ranks


@pytest.mark.long
@pytest.mark.parametrize("name", thinned(RUNS, {*RUNS} - {*LONG}))
def test_failure_on_one_rank_or_both(on_two, name):
    for rank, found in enumerate(on_two[name]):
        assert len(found) == RUNS[name]
        for what, result in found.items():
            assert_recovered(result)
            samples, splits, micro_batches, most, run = result["updates"][0]
            assert (samples, micro_batches) == (2 * B * K, 2 * K + splits), what
            assert (splits == 0) == (name == "undisturbed"), what
            others = on_two[name][1 - rank][what]["updates"][0]
            assert [splits, most] == [others[1], max(run, others[4])], what
            assert run + others[4] == micro_batches, what


@pytest.mark.long
def test_ranks_that_cannot_go_on_alone_say_so(on_two):
    lower = r"lower the micro-batch \(the effective batch stays\)"
    says = {
        "ddp, last": f"{lower}, or use recover_from_oom=always, which exchanges after it",
        "ddp, every-microbatch": f"the other processes wait for its gradients; {lower}, or use "
        "grad_sync=once-per-window",
        "ddp, every-microbatch, always": f"{lower}, or use grad_sync=once-per-window",
        "zero0": f"ZeRO stage 0 does not support it; {lower}, or use plain DDP",
        "zero1, last": f"{lower}, or use recover_from_oom=always",
        "zero2, every-microbatch": f"{lower}, or use grad_sync=once-per-window",
        "zero3": "zero3 gathers weights from all processes in every forward, so none can run one "
        f"alone; {lower}",
        "fsdp2": "fsdp2 gathers weights from all processes in every forward, so none can run one "
        f"alone; {lower}",
    }
    for found in on_two["refusals"]:
        assert found.keys() == says.keys()
        for name, message in found.items():
            with pytest.raises(
                EngineError,
                match=f"ran out of memory and cannot be run again in parts: .*{says[name]}",
            ):
                raise EngineError(message)


def test_one_rank_that_is_refused_ends_the_launch(tmp_path):
    """Its peer waits in the exchange, and is ended with it: the message is there, and nothing
    hangs."""
    run = torchrun(
        2, "tests.recovering", tmp_path / "out", "one_rank_alone_is_refused", timeout=120
    )
    assert run.returncode != 0
    assert "it is the last of its window, whose backward exchanges gradients" in run.stderr


@pytest.mark.long
def test_size_that_fits_is_found_on_two_processes_alike(on_two):
    for found in on_two["fits"]:
        assert len(found) == 6
        for name, result in found.items():
            assert result["found"] == [5, 80], name
            assert result["untouched"], name
            assert all(error <= EXACT for error in result["errors"]), name
