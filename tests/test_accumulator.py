"""What would lose gradient in silence is an error, and everything the docstrings refuse is
refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accum_trainer import AccumTrainerError, Accumulator, ConfigError, DataError, EngineError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def make(**options):
    acc = Accumulator(
        micro_batch_size=1, **({"gradient_accumulation_steps": 2, "cpu": True} | options)
    )
    model = torch.nn.Linear(1, 1, bias=False)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return acc, model, optimizer


def ones(count):
    return [torch.ones(1, 1) for _ in range(count)]


def windows(acc, count=4):
    return acc.windows(ones(count).__iter__(), count_targets=len)


def test_micro_batch_that_skipped_backward():
    acc, model, optimizer = make()
    with pytest.raises(
        AccumTrainerError, match=r"no backward\(\) of the Accumulator ran inside accumulate"
    ):
        for window in windows(acc):
            for batch in window:
                with acc.accumulate(model):
                    model(batch).sum().backward()


def test_micro_batch_that_skipped_accumulate():
    acc, model, _ = make()
    with pytest.raises(
        AccumTrainerError, match="1 of this window's micro-batches are due, but 0 went through"
    ):
        for window in windows(acc):
            for _ in window:
                pass


def test_window_that_was_left_early():
    acc, model, optimizer = make()
    window = next(iter(windows(acc)))
    for batch in window:
        with acc.accumulate(model):
            acc.backward(model(batch).sum(), reduction="sum")
        break
    with pytest.raises(
        AccumTrainerError, match="2 of this window's micro-batches are due, but 1 went through"
    ):
        acc.step(optimizer)


def test_window_that_was_never_stepped():
    acc, model, _ = make()
    with pytest.raises(
        AccumTrainerError, match="the window's gradient was not used: call acc.step"
    ):
        for batch in acc.batches(ones(4).__iter__(), count_targets=len):
            with acc.accumulate(model):
                acc.backward(model(batch).sum(), reduction="sum")


def test_window_iterated_twice():
    acc, model, _ = make()
    window = next(iter(windows(acc)))
    for batch in window:
        with acc.accumulate(model):
            acc.backward(model(batch).sum(), reduction="sum")
    with pytest.raises(AccumTrainerError, match="already iterated"):
        list(window)


def test_calls_outside_their_place():
    acc, model, optimizer = make()
    with pytest.raises(AccumTrainerError, match="outside a window"), acc.accumulate(model):
        pass
    with pytest.raises(AccumTrainerError, match="outside accumulate"):
        acc.backward(torch.zeros((), requires_grad=True), reduction="sum")
    with pytest.raises(AccumTrainerError, match="without a window to finish"):
        acc.step(optimizer)
    with pytest.raises(EngineError, match="pass the optimizer that acc.prepare"):
        acc.step(torch.optim.SGD(model.parameters(), lr=1))


def test_unknown_reduction():
    acc, model, _ = make()
    window = next(iter(windows(acc)))
    batch = next(iter(window))
    with acc.accumulate(model):
        with pytest.raises(AccumTrainerError, match="reduction='average' is not known"):
            acc.backward(model(batch).sum(), reduction="average")
        acc.backward(model(batch).sum(), reduction="sum")


def test_closure_is_refused():
    _, _, optimizer = make()
    with pytest.raises(EngineError, match="closure"):
        optimizer.step(lambda: 0)


def test_i12_data_parallel_is_refused():
    acc = Accumulator(micro_batch_size=1, cpu=True)
    with pytest.raises(EngineError, match="wrapped in DataParallel, which averages per GPU"):
        acc.prepare(torch.nn.DataParallel(torch.nn.Linear(1, 1)))


def test_unknown_objects_are_not_prepared():
    acc = Accumulator(micro_batch_size=1, cpu=True)
    with pytest.raises(EngineError, match=r"prepare\(\) got a str"):
        acc.prepare("model")


def test_a_loader_is_left_as_it_is():
    acc = Accumulator(micro_batch_size=1, cpu=True)
    loader = DataLoader(ones(3))
    assert acc.prepare(loader) is loader


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps=0 is below 1"),
        (
            dict(gradient_accumulation_steps=None, global_batch_size=0),
            "global_batch_size=0 is below 1",
        ),
        (dict(global_batch_size=3), "global_batch_size=3 contradicts"),
        (dict(max_grad_norm=0), "max_grad_norm=0 must be above 0"),
        (dict(grad_sync="sometimes"), "grad_sync='sometimes' is not known"),
        (dict(accumulation_dtype="float16"), "accumulation_dtype='float16'"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ConfigError, match=says):
        make(**options)


def test_accelerator_and_arguments_for_one():
    from accelerate import Accelerator

    with pytest.raises(ConfigError, match="accelerator is given together with cpu"):
        Accumulator(micro_batch_size=1, accelerator=Accelerator(cpu=True), cpu=True)


def test_i23_accelerators_k_must_agree():
    from accelerate import Accelerator

    with pytest.raises(
        ConfigError, match=r"gradient_accumulation_steps=2, but the Accelerator passed in has .*=4"
    ):
        Accumulator(
            micro_batch_size=1,
            gradient_accumulation_steps=2,
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4),
        )


def test_i23_accelerates_environment_must_agree(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(
        ConfigError, match="gradient_accumulation_steps=2, but the environment says"
    ):
        make()


def test_max_grad_norm_with_an_optimizer_that_accelerate_prepared():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    acc = Accumulator(micro_batch_size=1, max_grad_norm=1.0, accelerator=accelerator)
    model = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ConfigError,
        match=r"max_grad_norm=1.0 is applied by acc.step\(\) or an optimizer that acc.prepare",
    ):
        for batch in acc.batches(ones(2).__iter__(), count_targets=len):
            with acc.accumulate(model):
                acc.backward(model(batch).sum(), reduction="sum")
            optimizer.step()


# --- sources ---


def test_sources_that_are_none():
    acc, _, _ = make()
    with pytest.raises(DataError, match="int is no source of windows"):
        acc.windows(3)
    with pytest.raises(DataError, match="the data set is empty"):
        acc.windows([])
    with pytest.raises(DataError, match="a DataLoader has its own"):
        acc.windows(DataLoader(ones(2)), collate_fn=list)
    with pytest.raises(DataError, match="a stream yields batches"):
        acc.windows(iter(ones(2)), collate_fn=list)
    with pytest.raises(DataError, match="2 lengths are given for a data set of 3"):
        acc.windows(ones(3), lengths=np.array([1, 2]))


def test_used_up_stream_is_told():
    acc, model, optimizer = make()
    source = windows(acc)
    for window in source:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(batch).sum(), reduction="sum")
        acc.step(optimizer)
    assert (acc.num_updates, source.epoch) == (2, 1)
    with pytest.raises(DataError, match="already used up"):
        next(iter(source))


def test_batches_whose_targets_cannot_be_counted():
    acc, _, _ = make()
    with pytest.raises(
        DataError, match="cannot count the targets of a batch with type Tensor.*count_targets"
    ):
        next(iter(acc.windows(iter(ones(2)))))


def test_lengths_of_sources():
    acc, _, _ = make()
    assert len(acc.windows(ones(5))) == 3
    assert len(acc.windows(DataLoader(ones(7), batch_size=1))) == 4
    with pytest.raises(TypeError, match="has no length"):
        len(acc.windows(iter(ones(5))))


def test_a_loader_of_another_batch_size_is_refused():
    acc, _, _ = make()  # B 1, K 2
    with pytest.raises(
        DataError,
        match="batch_size=2, and B is 1, so that an update would see 4 samples instead of 2",
    ):
        acc.windows(DataLoader(ones(7), batch_size=2))


def test_iterable_dataset_loader_is_dealt_by_reading():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([torch.tensor([float(n)]) for n in range(1, 6)])

    acc, model, optimizer = make()
    seen = []
    for window in acc.windows(DataLoader(Stream(), batch_size=1), count_targets=len):
        seen.append([])
        for batch in window:
            seen[-1] += batch.flatten().tolist()
            with acc.accumulate(model):
                acc.backward(model(batch).sum(), reduction="sum")
        acc.step(optimizer)
    assert seen == [[1.0, 2.0], [3.0, 4.0], [5.0]]


def test_position_of_another_kind_is_refused():
    acc, _, _ = make()
    saved = acc.windows(ones(4)).state_dict()
    assert saved == {"epoch": 0, "samples_consumed": 0}
    with pytest.raises(DataError, match="does not count batches"):
        acc.windows(DataLoader(ones(4))).load_state_dict(saved)


def test_scheduler_steps_with_updates_only():
    acc, model, optimizer = make()
    scheduler = acc.prepare(
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
    )
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1]
    for batch in acc.batches(ones(4).__iter__(), count_targets=len):
        with acc.accumulate(model):
            acc.backward(model(batch).sum(), reduction="sum")
        optimizer.step()
        scheduler.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.1 / 3)]


def test_torch_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1+cpu"))
    with pytest.raises(EngineError, match=r"torch 2.10.1\+cpu is too old"):
        Accumulator(micro_batch_size=1, cpu=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_that_keeps_its_state_otherwise_is_refused(stage):
    from accum_trainer.engine.zero import STAGES
    from accum_trainer.engine.zero_internals import check_internals

    class DeepSpeedZeroOptimizerOfTomorrow:
        pass

    class DeepSpeedZeroOptimizer:
        averaged_gradients = all_grad_tensors = micro_step_id = None
        single_partition_of_fp32_groups = fp32_partitioned_groups_flat = None

    check_internals(DeepSpeedZeroOptimizer(), stage, STAGES[stage].internals)
    with pytest.raises(
        EngineError,
        match=r"keeps ZeRO-. state in another way.*averaged_gradients.*<0.21".replace(
            "-. ", f"-{stage}'s "
        ),
    ):
        check_internals(DeepSpeedZeroOptimizerOfTomorrow(), stage, STAGES[stage].internals)
