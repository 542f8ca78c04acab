"""Optimizers and schedulers of a loop: at the right step whoever calls them, or refused.

The truth is a loop by hand on the whole batch in float64.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from accum_trainer import AccumTrainerError, Accumulator, EngineError
from tests.guarded import (
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

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=8, gamma=0.5),
    "ConstantLR": lambda optimizer: ConstantLR(optimizer, factor=0.5, total_iters=8),
    "MultiStepLR": lambda optimizer: MultiStepLR(optimizer, [12], gamma=0.1),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("made", ["on the prepared one", "on the raw one, in the third epoch"])
def test_a_scheduler_that_was_not_prepared_may_not_step_inside_a_window(kind, made):
    acc, model, (optimizer,) = start()
    scheduler = SCHEDULERS[kind](optimizer) if made == "on the prepared one" else None
    with pytest.raises(AccumTrainerError, match=r"the learning rate was stepped between two"):
        for epoch in range(3):
            for batch in batches(acc):
                accumulate(acc, model, batch)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
            if epoch == 1:
                scheduler = SCHEDULERS[kind](optimizer.optimizer)


def test_an_optimizer_that_would_never_step_is_refused():
    acc, model, (first, second) = start(optimizers=2)
    with pytest.raises(AccumTrainerError, match="another optimizer has finished this window"):
        for batch in batches(acc):
            accumulate(acc, model, batch)
            first.step()
            second.step()
    assert acc.num_updates == 1


def test_two_optimizers_may_take_turns_and_see_their_own_windows_only():
    """As the two players of a GAN do: each window is an update of one, also in what it leaves."""
    acc, model, optimizers = start(optimizers=2)
    exact = network().double()
    by_hand = [torch.optim.SGD(exact[i].parameters(), lr=0.1) for i in (0, 2)]
    for number, window in enumerate(
        acc.windows(DataLoader(data(), batch_size=B), count_targets=count)
    ):
        for batch in window:
            accumulate(acc, model, batch)
        acc.step(optimizers[number % 2])
    for number, window in enumerate(windows_by_hand()):
        exact.zero_grad()
        update_by_hand(exact, by_hand[number % 2], window)
    for found, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)


def test_parameters_that_join_the_optimizer_bring_no_gradient_of_earlier_windows():
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K)
    model = network()
    exact = copy.deepcopy(model).double()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    by_hand = torch.optim.SGD(exact[2].parameters(), lr=0.1)
    source = DataLoader(data(), batch_size=B)
    windows = acc.windows(source, count_targets=count)
    for number, (window, whole) in enumerate(zip(windows, windows_by_hand(), strict=True)):
        if number == 2:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.1})
            by_hand.add_param_group({"params": list(exact[0].parameters()), "lr": 0.1})
        for batch in window:
            accumulate(acc, model, batch)
        acc.step(optimizer)
        exact.zero_grad()
        update_by_hand(exact, by_hand, whole)
    for found, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)


def test_an_optimizer_that_was_not_prepared_is_refused():
    acc, model, (optimizer,) = start(prepare=False)
    model = acc.prepare(model)
    with pytest.raises(AccumTrainerError, match="no optimizer was prepared"):
        for batch in batches(acc):
            accumulate(acc, model, batch)
            optimizer.step()
            optimizer.zero_grad()


SCHEDULES = {
    "StepLR": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=2), ExponentialLR(optimizer, 0.5)], [2]
    ),
    "ChainedScheduler": lambda optimizer: ChainedScheduler(
        [ConstantLR(optimizer, total_iters=3), ExponentialLR(optimizer, 0.5)]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_prepared_scheduler_gives_each_update_its_rate_in_any_order(kind, order, inside):
    acc, model, (optimizer,) = start()
    scheduler = acc.prepare(SCHEDULES[kind](optimizer.optimizer))
    exact = network().double()
    by_hand = torch.optim.SGD(exact.parameters(), lr=0.1)
    schedule = SCHEDULES[kind](by_hand)
    steps = [optimizer.step, scheduler.step, optimizer.zero_grad]
    if order == "scheduler first":
        steps[:2] = reversed(steps[:2])
    for batch in batches(acc):
        with acc.accumulate(model):
            acc.backward(squares(model, batch), reduction="sum")
            for step in steps if inside else []:
                step()
        for step in [] if inside else steps:
            step()
    for window in windows_by_hand():
        update_by_hand(exact, by_hand, window)
        schedule.step()
    assert scheduler.get_last_lr() == schedule.get_last_lr()
    assert_same(model, exact)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_scheduler_whose_state_is_loaded_before_the_accumulators_does_not_step_for_it():
    def made():
        acc, model, (optimizer,) = start()
        scheduler = acc.prepare(StepLR(optimizer.optimizer, 1, 0.5))
        return [model, optimizer, scheduler, acc, batches(acc)]

    def train(model, optimizer, scheduler, acc, source, until=None):
        for batch in source:
            accumulate(acc, model, batch)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if acc.num_updates == until:
                break

    first, resumed, whole = made(), made(), made()
    train(*first, until=2)
    for part, state in zip(resumed, [part.state_dict() for part in first], strict=True):
        part.load_state_dict(copy.deepcopy(state))
    train(*resumed)
    train(*whole)
    assert_same(resumed[0], whole[0].double())


def test_steps_of_a_prepared_scheduler_that_go_nowhere_are_told(caplog):
    acc, _, (optimizer,) = start()
    scheduler = acc.prepare(StepLR(optimizer.optimizer, 1, 0.5))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # to the position of a run that is continued
            scheduler.step()
    assert scheduler.get_last_lr() == [0.1]
    assert [r.getMessage()[:55] for r in caplog.records] == [
        "scheduler.step() does nothing before the first update: "
    ]


class ScheduleFree(torch.optim.SGD):
    """An optimizer with modes, as those of schedulefree have."""

    mode = "train"

    def eval(self):
        self.mode = "eval"


def test_what_the_users_optimizer_has_the_prepared_one_has_too():
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K)
    model = network()
    model, optimizer = acc.prepare(model, ScheduleFree(model.parameters(), lr=0.1))
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(acc.num_updates))
    for batch in batches(acc):
        accumulate(acc, model, batch)
        optimizer.step()
    optimizer.eval()
    assert steps == [0, 1, 2, 3]
    assert optimizer.optimizer.mode == "eval"
    with pytest.raises(AttributeError):
        optimizer.no_such_thing  # noqa: B018


def test_an_optimizer_that_needs_a_closure_is_refused_before_training():
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K)
    model = network()
    with pytest.raises(EngineError, match="LBFGS needs a closure, and a closure would run"):
        acc.prepare(model, torch.optim.LBFGS(model.parameters()))
