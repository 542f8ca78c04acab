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
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from accum_trainer import AccumTrainerError, Accumulator, DataError, EngineError
from tests.reference import make_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

B, K, SAMPLES = 2, 4, 32


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 2, generator=generator)
    )


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def squares(model: torch.nn.Module, batch) -> torch.Tensor:
    inputs, wanted = batch
    return ((model(inputs) - wanted) ** 2).sum()


def count(batch) -> int:
    return len(batch[0])


PREPARED_BY = pytest.mark.parametrize("prepared_by", ["acc", "accelerate"])


def start(optimizers=1, prepare=True, prepared_by="acc", **options):
    model = network()
    halves = [list(model[0].parameters()), list(model[2].parameters())]
    groups = halves if optimizers == 2 else [[p for half in halves for p in half]]
    raw = [torch.optim.SGD(group, lr=0.1) for group in groups]
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K, **options)
    if prepare:
        prepare_all = acc.prepare if prepared_by == "acc" else acc.accelerator.prepare
        model, *raw = prepare_all(model, *raw)
    return acc, model, raw


def batches(acc):
    return acc.batches(DataLoader(data(), batch_size=B), count_targets=count)


def accumulate(acc, model, batch):
    with acc.accumulate(model):
        acc.backward(squares(model, batch), reduction="sum")


def update_by_hand(model, optimizer, window):
    """One update from the whole window."""
    optimizer.zero_grad()
    (squares(model, window) / len(window[0])).backward()
    optimizer.step()


def windows_by_hand():
    inputs, wanted = data().tensors
    step = B * K
    for begin in range(0, SAMPLES, step):
        yield inputs[begin : begin + step].double(), wanted[begin : begin + step].double()


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


def assert_same(model, exact):
    for found, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)


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
