"""A loop that makes updates wrong by what it does between micro-batches is refused, or exact.

The truth is a loop by hand on the whole batch in float64.
"""

from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import (
    StepLR,
)
from torch.utils.data import DataLoader

from accum_trainer import AccumTrainerError, Accumulator, DataError
from tests.guarded import (
    PREPARED_BY,
    SAMPLES,
    B,
    K,
    accumulate,
    assert_same,
    batches,
    count,
    data,
    network,
    squares,
    start,
    update_by_hand,
    windows_by_hand,
)
from tests.reference import make_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("how", ["the model's", "the raw optimizer's", "by hand"])
def test_dropping_the_gradient_between_micro_batches_is_refused(how):
    acc, model, (optimizer,) = start()

    def drop():
        if how == "by hand":
            for parameter in model.parameters():
                parameter.grad = None
        else:
            (model if how == "the model's" else optimizer.optimizer).zero_grad()

    with pytest.raises(AccumTrainerError, match="the gradient was dropped between two micro-"):
        for batch in batches(acc):
            accumulate(acc, model, batch)
            optimizer.step()
            drop()


def test_replacing_a_gradient_between_micro_batches_is_refused():
    acc, model, (optimizer,) = start()
    with pytest.raises(AccumTrainerError, match="the gradient was changed between two micro-"):
        for batch in batches(acc):
            accumulate(acc, model, batch)
            model[0].weight.grad = model[0].weight.grad / 2
            optimizer.step()


def test_a_backward_between_two_windows_adds_nothing_to_the_next():
    acc, model, (optimizer,) = start()
    exact = network().double()
    by_hand = torch.optim.SGD(exact.parameters(), lr=0.1)
    for window in acc.windows(DataLoader(data(), batch_size=B), count_targets=count):
        for batch in window:
            accumulate(acc, model, batch)
        acc.step(optimizer)
        model(torch.ones(1, 3, requires_grad=True)).sum().backward()  # to look at the inputs'
    for window in windows_by_hand():
        update_by_hand(exact, by_hand, window)
    assert_same(model, exact)


def test_a_parameter_that_is_unfrozen_accumulates_in_float32_too():
    """256 + 1 - 256 is 0 in bf16."""
    acc = Accumulator(micro_batch_size=1, gradient_accumulation_steps=3)
    model = torch.nn.Linear(1, 1, bias=False).bfloat16().requires_grad_(False)
    stepped = []
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd.register_step_pre_hook(lambda *_: stepped.append(model.weight.grad.item()))
    model, optimizer = acc.prepare(model, sgd)
    model.requires_grad_(True)
    values = torch.tensor([256.0, 1.0, -256.0]).bfloat16().view(3, 1, 1)
    for batch in acc.batches(iter(values), count_targets=len):
        with acc.accumulate(model):
            acc.backward(3 * model(batch).sum(), reduction="sum")
        optimizer.step()
    assert stepped == [1.0]


@pytest.mark.parametrize("by", ["torch", "accelerate"])
def test_clipping_between_micro_batches_is_refused(by):
    acc, model, (optimizer,) = start()
    clip = torch.nn.utils.clip_grad_norm_ if by == "torch" else acc.accelerator.clip_grad_norm_
    with pytest.raises(AccumTrainerError, match=r"changed between two micro-batches.*max_grad_n"):
        for batch in batches(acc):
            accumulate(acc, model, batch)
            clip(model.parameters(), 0.5)
            optimizer.step()


def test_clipping_after_the_last_micro_batch_is_that_of_max_grad_norm():
    found = []
    for clips_in_loop in (True, False):
        acc, model, (optimizer,) = start(**({} if clips_in_loop else {"max_grad_norm": 0.5}))
        for batch in batches(acc):
            accumulate(acc, model, batch)
            if clips_in_loop and acc.accelerator.sync_gradients:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@PREPARED_BY
def test_a_window_that_a_loop_left_belongs_to_no_update_and_is_reported(prepared_by, caplog):
    acc, model, (optimizer,) = start(prepared_by=prepared_by)
    exact = network().double()
    by_hand = torch.optim.SGD(exact.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        for number, batch in enumerate(batches(acc)):
            accumulate(acc, model, batch)
            optimizer.step()
            optimizer.zero_grad()
            if number == 5:  # one update, and two micro-batches of the next window
                break
    assert "left after 2 of a window's 4 micro-batches" in caplog.text
    for batch in batches(acc):
        accumulate(acc, model, batch)
        optimizer.step()
        optimizer.zero_grad()
    first, *_ = windows_by_hand()
    for window in (first, *windows_by_hand()):
        update_by_hand(exact, by_hand, window)
    assert acc.num_updates == 5
    for found, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)


def test_two_windows_at_once_are_refused():
    acc, _, _ = start()
    first = iter(acc.windows(DataLoader(data(), batch_size=B), count_targets=count))
    second = iter(acc.windows(DataLoader(data(), batch_size=B), count_targets=count))
    next(first)
    with pytest.raises(AccumTrainerError, match="a new window began before the last was finished"):
        next(second)


@PREPARED_BY
def test_a_step_inside_accumulate_is_that_after_it(prepared_by):
    """Where Accelerate's own examples have it."""
    weights = []
    for inside in (False, True):
        acc, model, (optimizer,) = start(prepared_by=prepared_by)
        scheduler = StepLR(getattr(optimizer, "optimizer", optimizer), step_size=1, gamma=0.5)
        scheduler = acc.prepare(scheduler)
        for batch in batches(acc):
            with acc.accumulate(model):
                acc.backward(squares(model, batch), reduction="sum")
                if inside:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if not inside:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        assert acc.num_updates == SAMPLES // (B * K)
        weights.append([p.detach().clone() for p in model.parameters()])
    for after, inside in zip(*weights, strict=True):
        assert torch.equal(after, inside)


def test_step_of_the_accumulator_inside_accumulate_is_refused():
    acc, model, (optimizer,) = start()
    with pytest.raises(AccumTrainerError, match=r"step\(\) inside accumulate\(\)"):
        for window in acc.windows(DataLoader(data(), batch_size=B), count_targets=count):
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(squares(model, batch), reduction="sum")
                    acc.step(optimizer)


def test_gradients_are_let_go_after_the_step():
    acc, model, (optimizer,) = start()
    for batch in batches(acc):
        accumulate(acc, model, batch)
        gradient = weakref.ref(model[0].weight.grad)
        optimizer.step()
    assert gradient() is None


def test_accumulating_a_micro_batch_twice_is_refused():
    acc, model, _ = start()
    for batch in batches(acc):
        accumulate(acc, model, batch)
        with pytest.raises(AccumTrainerError, match="ran before for this micro-batch"):
            accumulate(acc, model, batch)
        break


def masked_mean(model, batch):
    inputs, wanted, mask = batch
    return (((model(inputs) - wanted) ** 2).sum(1) * mask).sum() / mask.sum()


@PREPARED_BY
def test_a_window_whose_mean_is_over_no_target_is_skipped_and_said(prepared_by):
    """Also under momentum, which would move the weights on a gradient of 0."""
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=1)
    model = network()
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    prepare = acc.prepare if prepared_by == "acc" else acc.accelerator.prepare
    model, optimizer = prepare(model, adam)
    some = (torch.ones(B, 3), torch.ones(B, 2), torch.ones(B))
    empty = (torch.zeros(B, 3), torch.zeros(B, 2), torch.zeros(B))
    before, updates = {}, []
    for batch in acc.batches(iter([some, empty]), count_targets=lambda b: float(b[2].sum())):
        before = copy.deepcopy(model.state_dict())
        with acc.accumulate(model):
            acc.backward(masked_mean(model, batch), reduction="mean")
        optimizer.step()
        optimizer.zero_grad()
        updates.append(acc.last_update)
    assert [(u.step, u.skipped, u.reason) for u in updates] == [(1, False, ""), (1, True, "empty")]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def llama_batches(acc, labels=True, **options):
    ids = torch.arange(4 * 6).view(4, 6) % 32
    rows = [{"input_ids": row} | ({"labels": row} if labels else {}) for row in ids]
    return acc.batches(DataLoader(rows, batch_size=2), **options)


@pytest.mark.parametrize("scale", [lambda loss: loss / 2, lambda loss: 0.5 * loss])
@pytest.mark.parametrize("reduction", [None, "mean"])
def test_the_models_loss_divided_by_k_is_refused_with_the_reason(scale, reduction):
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2)
    model = make_model("llama")
    model, _ = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(AccumTrainerError, match="own loss, divided or multiplied by a number"):
        for batch in llama_batches(acc):
            with acc.accumulate(model):
                acc.backward(scale(model(**batch).loss), reduction=reduction)


def test_forgotten_labels_are_named_at_every_step():
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2)
    model = make_model("llama")
    model, _ = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DataError, match="add labels"):
        next(iter(llama_batches(acc, labels=False)))
    counted = llama_batches(acc, labels=False, count_targets=lambda b: b["input_ids"].numel())
    with pytest.raises(AccumTrainerError, match="got None, no loss; a model returns one only if"):
        for batch in counted:
            with acc.accumulate(model):
                acc.backward(model(**batch).loss)
