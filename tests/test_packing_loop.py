"""Packed batches in a user's loop: exact, or refused before the first update with the remedy.

A weight after its step is rounded to float32, so that an update of SGD with rate 1 is known to 1e-5
of the gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from accum_trainer import Accumulator, DataError, causal_lm_loss
from accum_trainer.batch import BOUNDARIES
from accum_trainer.sources.collating import PackingCollator
from accum_trainer.window_plan import Cut
from tests.recovering import out_of_memory
from tests.reference import make_model, pad, relative_error
from tests.test_packing import ROWS, Convolution, FewRows, gradient_apart, make


def run_loop(model: torch.nn.Module, loss, batches: list):
    """One update of SGD with rate 1 over `batches`; returns (the weights before, those after)."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    acc = Accumulator(micro_batch_size=5, gradient_accumulation_steps=len(batches), cpu=True)
    prepared, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    try:
        for window in acc.windows(iter(batches)):
            for batch in window:
                with acc.accumulate(prepared):
                    acc.backward(loss(prepared, batch))
            acc.step(optimizer)
    finally:
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return before, after


def stepped(before, after) -> dict[str, torch.Tensor]:
    return {name: before[name] - after[name] for name in before}


def own_loss(model, batch):
    return model(**batch).loss


PACKED = [PackingCollator()(ROWS[:3]), PackingCollator()(ROWS[3:])]


def test_i41_a_loop_with_the_cache_left_on_is_exact_or_refused(fresh_accelerate):
    for loss, use_cache in ((causal_lm_loss, True), (own_loss, False)):
        model = make("Llama")
        model.config.use_cache = use_cache
        exact = gradient_apart(model)
        assert relative_error(stepped(*run_loop(model, loss, PACKED)), exact) <= 1e-5
    model = make("Llama")
    model.config.use_cache = True
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        DataError, match=r"a packed batch of 3 samples on Llama.*set model.config.use_cache = False"
    ):
        run_loop(model, own_loss, PACKED)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_i40_a_loop_on_a_model_that_leaks_is_refused_before_the_first_update(fresh_accelerate):
    model = make("Mamba2")
    before = copy.deepcopy(model.state_dict())
    for loss in (causal_lm_loss, own_loss):
        with pytest.raises(
            DataError,
            match=r"packed batch of 3 samples on Mamba2.*see each other: .*give it padded",
        ):
            run_loop(model, loss, PACKED)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # A sample alone in its row sees no other.
    run_loop(model, causal_lm_loss, [PackingCollator()(ROWS[1:2])])
    run_loop(model, causal_lm_loss, [pad(ROWS)])


def test_i40_a_loop_is_told_of_boundaries_that_would_do(fresh_accelerate):
    with pytest.raises(
        DataError, match=r"collate with PackingCollator\(boundaries=\('seq_idx',\)\)"
    ):
        run_loop(Convolution(), causal_lm_loss, PACKED)
    collate = PackingCollator(("seq_idx",))
    model = Convolution()
    exact = gradient_apart(model)
    before, after = run_loop(model, causal_lm_loss, [collate(ROWS[:3]), collate(ROWS[3:])])
    assert relative_error(stepped(before, after), exact) <= 1e-5
    with pytest.raises(
        DataError, match=r"holds the boundaries \(\), but \('seq_idx',\) are proven"
    ):
        run_loop(Convolution(), causal_lm_loss, [collate(ROWS[:4]), PackingCollator()(ROWS[1:3])])


def test_boundaries_go_through_windows_and_halves(fresh_accelerate):
    """A planned window of packed rows with boundaries; one runs out of memory and returns in
    halves."""
    model = make("Llama")
    exact, given = gradient_apart(model), []
    acc = Accumulator(micro_batch_size=3, global_batch_size=6, cpu=True)
    prepared, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows = acc.windows(
        ROWS,
        collate_fn=PackingCollator(BOUNDARIES),
        lengths=FewRows().lengths,
        cut=Cut(3, packed=True),
        prefetch=True,
    )
    for window in windows:
        for number, batch in enumerate(window):
            given.append(batch)
            with acc.accumulate(prepared):
                acc.backward(causal_lm_loss(prepared, batch))
                if number == 0:
                    out_of_memory()
        assert acc.step(optimizer).num_splits == 1
    assert (
        relative_error(stepped(before, {n: p.detach() for n, p in model.named_parameters()}), exact)
        <= 1e-5
    )
    for batch in given:
        assert batch["cu_seq_lens_q"].tolist()[-1] == batch["input_ids"].numel()
        assert batch["max_length_q"] == batch["position_ids"].max() + 1


def test_i40_packed_batches_after_a_window_without_one_are_refused(fresh_accelerate):
    acc = Accumulator(micro_batch_size=5, gradient_accumulation_steps=1, cpu=True)
    model = make_model("llama")
    prepared, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    seen = []
    with pytest.raises(
        DataError,
        match="first window was packed.*put a packed one into the first window",
    ):
        for window in acc.windows(iter([pad(ROWS), PackingCollator()(ROWS)])):
            for batch in window:
                with acc.accumulate(prepared):
                    acc.backward(causal_lm_loss(prepared, batch))
            seen.append(acc.step(optimizer).num_samples)
    assert seen == [5]


def test_i40_rows_packed_in_another_way_are_refused(fresh_accelerate):
    row = PackingCollator()(ROWS)
    several = {name: value.repeat(2, 1) for name, value in row.items()}
    masked = row | {"attention_mask": torch.ones_like(row["input_ids"])}
    says = r"position_ids of shape \({}, 80\) that restart inside a row{}: .*lay them in one row"
    for batch, message in (
        (several, says.format(2, "")),
        (masked, says.format(1, " next to an attention_mask")),
    ):
        with pytest.raises(DataError, match=message):
            run_loop(make("Llama"), causal_lm_loss, [batch])
    # Padding on the left, with positions that start after it, is no packed row.
    padded = {name: value.flip(1) for name, value in pad(ROWS).items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    padded["labels"] = padded["labels"].masked_fill(
        padded["position_ids"] == 0, -100
    )  # no target of padding
    run_loop(make("Llama"), causal_lm_loss, [padded])


@pytest.mark.parametrize("name", BOUNDARIES)
def test_i40_boundaries_that_are_not_those_of_the_positions_are_refused(name, fresh_accelerate):
    good = PackingCollator(BOUNDARIES)(ROWS)
    wrong = good | {name: good[name] - 1 if isinstance(good[name], int) else good[name].flip(-1)}
    with pytest.raises(DataError, match=f"its {name} does not fit its position_ids"):
        run_loop(make("Llama"), causal_lm_loss, [wrong])
    run_loop(
        make("Llama"), causal_lm_loss, [good | {"seq_idx": good["seq_idx"] + 1, "max_length_q": 99}]
    )
