"""Sources of windows: refused inputs, and samples over several epochs."""

from __future__ import annotations

import gc
import json
import os
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from accum_trainer import Accumulator, DataError
from accum_trainer.window_plan import Cut
from tests.launching import torchrun


def test_i43_the_same_stream_on_every_rank_is_refused_and_equal_batches_are_not(tmp_path):
    run = torchrun(2, "tests.streams", tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    # A verdict takes two different batches and eight different samples: the first window at K=4,
    # the fourth at K=1.
    refused = {"the same, K=4": 0, "the same, K=1": 3, "the same dictionaries": 0}
    # 12 batches, split or not, in windows of K on each rank.
    whole = {
        "split": 3,
        "split, equal masks": 3,
        "one batch again and again": 3,
        "constant": 2,
        "tiny": 3,
        "equal at first": 6,
        # 24 samples in windows of 8.
        "a whole data set": 3,
        "workers over a whole data set": 3,
        "a whole data set with noise": 3,
        "a whole data set with paths": 3,
    }
    split = dict.fromkeys((name for name in ranks[0] if "split by rank" in name), 0)
    assert len(split) == 4
    for name, updates in {**refused, **whole, **split}.items():
        found = ranks[0][name]
        assert found["updates"] == updates, (name, found)
        if "split by rank" in name:
            assert "already split by rank" in found["raised"], name
            assert "Pass the whole data set" in found["raised"] or "iterable" in name
            assert "iter(batches)" in found["raised"], name
        elif name in refused:
            assert "processes 0 and 1 read the same batches" in found["raised"]
            assert "itertools.islice(stream, rank, None, 2)" in found["raised"]
        else:
            assert found["raised"] == "", name
    # The other rank is in the middle of the epoch that this one left: a collective of one of them.
    left = ranks[0]["left early"]
    assert left["updates"] == 2
    assert "DataError: process 1 begins an epoch while others are in the middle" in left["raised"]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "batches",
    [
        [
            {
                "input_ids": torch.ones(4, 12, dtype=torch.long),
                "labels": torch.ones(4, 12, dtype=torch.long),
            }
        ]
        * 3,
        [{"input_ids": torch.ones(1, 12, dtype=torch.long)}] * 3,
        [torch.ones(4, 3), torch.ones(4, 3), torch.ones(2, 3)],
        [(torch.ones(4, 3), torch.ones(4)), (torch.ones(4, 3), torch.ones(4))],
        [{"x": torch.ones(4, 3), "y": torch.ones(4)}] * 2,
    ],
)
def test_i43_a_list_of_ready_batches_is_no_data_set(batches):
    acc = Accumulator(micro_batch_size=4, cpu=True)
    with pytest.raises(
        DataError, match=r"holds batches, not samples.*iter\(batches\).*default_collate"
    ):
        acc.windows(batches)
    # An explicit collate_fn says that these are samples.
    assert len(acc.windows(batches, collate_fn=default_collate)) == 1


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "samples",
    [
        [{"input_ids": torch.ones(4, dtype=torch.long), "labels": torch.ones(4, dtype=torch.long)}]
        * 4,
        [torch.ones(3, 4)] * 4,
        [torch.ones(4)] * 4,
        [(torch.ones(4, 3), torch.tensor(1))] * 4,
        [(torch.ones(4, 3), torch.ones(5))] * 4,
        [(torch.ones(4, 3), 1)] * 4,
        [{"input_ids": [1, 2, 3, 4]}] * 4,
    ],
)
def test_i43_a_list_of_samples_is_a_data_set(samples):
    assert len(Accumulator(micro_batch_size=4, cpu=True).windows(samples)) == 1


# --- epochs ---

SIZE, B, B_EFF = 22, 2, 8  # windows of 8, 8 and 6 samples


def reset_accelerate():
    """accelerate keeps its state in its classes, and names no other way to reset it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accumulator():
    reset_accelerate()
    acc = Accumulator(micro_batch_size=B, global_batch_size=B_EFF, cpu=True)
    model = torch.nn.Linear(1, 1)
    return acc, *acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))


def trained(acc, model, optimizer, batches, updates=100):
    """The samples of a loop over `batches` that stops after this many updates."""
    seen, before = [], acc.num_updates
    for batch in batches:
        seen += batch.flatten().int().tolist()
        with acc.accumulate(model):
            acc.backward(model(batch).sum(), reduction="sum")
        optimizer.step()
        if acc.num_updates == before + updates:
            break
    return seen


def samples():
    return [torch.tensor([float(i)]) for i in range(SIZE)]


SOURCES = {
    "list": samples,
    "data set": lambda: TensorDataset(torch.stack(samples())),
    "loader": lambda: DataLoader(samples(), batch_size=B, shuffle=True),
    "stream": lambda: _Shuffled(),
}


class _Shuffled:
    """An iterable of this process's batches with another order in each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SIZE // B

    def __iter__(self):
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch))
        return (order[i : i + B, None].float() for i in range(0, SIZE, B))


@pytest.fixture(params=list(SOURCES))
def make(request):
    """() -> (source, options of `windows`)."""
    collate = (
        {"collate_fn": lambda rows: torch.stack([row[0] for row in rows])}
        if request.param == "data set"
        else {}
    )
    return lambda: (SOURCES[request.param](), {"count_targets": len} | collate)


def test_i42_each_loop_over_a_source_is_the_next_epoch(make):
    source, options = make()
    acc, *training = accumulator()
    inline = [trained(acc, *training, acc.batches(source, **options)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in inline)
    assert len({tuple(epoch) for epoch in inline}) == 3

    source, options = make()
    acc, *training = accumulator()
    hoisted = acc.batches(source, **options)
    assert [trained(acc, *training, hoisted) for _ in range(2)] == inline[:2]
    assert trained(acc, *training, acc.batches(acc.windows(source, **options))) == inline[2]
    assert hoisted.epoch == acc.windows(source, **options).epoch == 3
    assert len(hoisted) == 11 and len(acc.windows(source, **options)) == 3  # counted by hand


def test_i42_an_epoch_that_was_left_early_is_followed_by_the_next(make):
    source, options = make()
    acc, *training = accumulator()
    whole = [trained(acc, *training, acc.batches(source, **options)) for _ in range(3)]

    source, options = make()
    acc, *training = accumulator()
    assert trained(acc, *training, acc.batches(source, **options), updates=1) == whole[0][:B_EFF]
    hoisted = acc.batches(source, **options)
    assert trained(acc, *training, hoisted, updates=2) == whole[1][: 2 * B_EFF]
    saved = hoisted.state_dict()
    unit = next(key for key in saved if key != "epoch")
    assert {key: saved[key] for key in saved if key != "consumed_crc"} == {
        "epoch": 1,
        unit: {"samples_consumed": 2 * B_EFF, "batches_consumed": 2 * B_EFF // B}[unit],
    }
    assert trained(acc, *training, hoisted) == whole[2]

    # Resumed in another process: the rest of that epoch, then the next, from any Windows.
    source, options = make()
    acc, *training = accumulator()
    acc.windows(source, **options).load_state_dict(saved)
    assert trained(acc, *training, acc.batches(source, **options)) == whole[1][2 * B_EFF :]
    assert trained(acc, *training, acc.batches(source, **options)) == whole[2]


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}]
)
def test_i42_a_loaders_own_generator_orders_as_in_a_plain_loop_and_after_resuming(options):
    def loader():
        return DataLoader(
            samples(),
            batch_size=B,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
            **options,
        )

    plain = loader()
    whole = [[int(x) for batch in plain for x in batch.flatten()] for _ in range(3)]
    acc, *training = accumulator()
    batches = acc.batches(loader(), count_targets=len)
    assert trained(acc, *training, batches) == whole[0]
    between = batches.state_dict()
    assert trained(acc, *training, batches, updates=1) == whole[1][:B_EFF]
    within = batches.state_dict()
    for saved, rest in ((between, whole[1]), (within, whole[1][B_EFF:])):
        acc, *training = accumulator()
        batches = acc.batches(loader(), count_targets=len)
        batches.load_state_dict(saved)
        assert batches.state_dict()["batches_consumed"] == saved["batches_consumed"]
        assert trained(acc, *training, batches) == rest
        assert trained(acc, *training, batches) == whole[2]


def test_i42_shares_of_one_data_set_have_epochs_of_their_own():
    data = samples()
    acc, *training = accumulator()
    for _ in range(2):
        shares = [acc.batches(data, count_targets=len, shard=(i, 2)) for i in range(2)]
        assert sorted(
            trained(acc, *training, shares[0]) + trained(acc, *training, shares[1])
        ) == list(range(SIZE))


def test_i42_a_generator_that_was_left_is_read_on_and_nothing_of_it_is_lost():
    acc, *training = accumulator()
    batches = acc.batches(
        (torch.tensor([[2.0 * i], [2.0 * i + 1]]) for i in range(11)), count_targets=len
    )
    first = trained(acc, *training, batches, updates=1)
    assert batches.state_dict() == {"epoch": 0, "batches_consumed": 4}
    assert first + trained(acc, *training, batches) == list(range(SIZE))


@pytest.mark.long
def test_i42_a_source_that_is_gone_is_forgotten():
    acc, *training = accumulator()
    loader = DataLoader(samples(), batch_size=B)
    trained(acc, *training, acc.batches(loader, count_targets=len))
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None


# --- reading while a window is trained on ---


class Logged(DataLoader):
    """A user's loader class that counts the batches taken from it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.taken = []

    def __iter__(self):
        for batch in super().__iter__():
            self.taken.append(batch)
            yield batch


class Stateful(Logged):
    """Like torchdata's: its state counts the batches taken from it."""

    def state_dict(self):
        return {"taken": len(self.taken)}

    def load_state_dict(self, state):
        raise NotImplementedError


class Pids:
    """Samples that hold the id of the process that read them; the one at `broken` fails."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("the disk is gone")
        return torch.tensor([float(index), float(os.getpid())])


class PidStream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        return (Pids()[i] for i in range(worker.id, SIZE, worker.num_workers))


def run(loader, epochs=1):
    """Batches taken before each micro-batch, the processes that read each epoch, the updates."""
    acc, *_ = accumulator()
    model = torch.nn.Linear(2, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    taken, readers = [], []
    try:
        for _ in range(epochs):
            readers.append(set())
            for batch in acc.batches(loader, count_targets=len, seed=len(readers)):
                taken.append(len(loader.taken))
                readers[-1] |= set(batch[:, 1].int().tolist())
                with acc.accumulate(model):
                    acc.backward(model(batch).sum(), reduction="sum")
                optimizer.step()
    except OSError as error:
        assert "the disk is gone" in str(error)
    return taken, readers, acc.num_updates


# K = 4 and 11 batches: the window's four are needed at once, and each micro-batch takes one more.
EARLY = [4, 5, 6, 7, 8, 9, 10, 11, 11, 11, 11]
AT_ONCE = [4, 4, 4, 4, 8, 8, 8, 8, 11, 11, 11]


@pytest.mark.parametrize(
    ("data", "options", "kind", "expected"),
    [
        (Pids(), {"num_workers": 1}, Logged, EARLY),
        (PidStream(), {"num_workers": 1}, Logged, EARLY),
        (Pids(), {}, Logged, AT_ONCE),  # read in this process: not before it is needed
        (Pids(), {"num_workers": 1}, Stateful, AT_ONCE),  # its state must count what was trained on
    ],
)
def test_next_window_is_read_while_this_one_is_trained_on(data, options, kind, expected):
    loader = kind(data, batch_size=B, **options)
    taken, readers, updates = run(loader)
    assert taken == expected
    assert updates == 3
    assert (readers == [{os.getpid()}]) == (not options)


@pytest.mark.long
def test_persistent_workers_and_the_class_of_a_loader_are_kept():
    loader = Logged(Pids(), batch_size=B, num_workers=1, persistent_workers=True, prefetch_factor=3)
    _, readers, updates = run(loader, epochs=3)
    assert updates == 9
    assert readers[0] == readers[1] == readers[2] and len(readers[0]) == 1
    _, again, _ = run(loader)  # another Accumulator has its own
    assert again[0].isdisjoint(readers[0])
    _, readers, _ = run(Logged(Pids(), batch_size=B, num_workers=1), epochs=2)
    assert readers[0] != readers[1]


def test_what_cannot_be_read_early_is_told_in_its_turn():
    # The first sample of the third window.
    loader = Logged(Pids(broken=2 * B_EFF), batch_size=B, num_workers=1)
    assert run(loader)[2] == 2


class LoggedSampler(SequentialSampler):
    """Records the indices drawn; workers receive theirs two batches ahead."""

    def __iter__(self):
        self.drawn = []
        for index in super().__iter__():
            self.drawn.append(index)
            yield index


@pytest.mark.parametrize("together", [False, True])
def test_a_loader_that_all_processes_read_together_is_not_read_while_one_of_them_trains(together):
    """accelerate's dispatcher runs a collective per batch; ranks must not start it mid-window."""
    reset_accelerate()
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=together)
    )
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=4, accelerator=accelerator)
    model, optimizer = acc.prepare(
        model := torch.nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=1e-6)
    )
    sampler = LoggedSampler(Pids())
    loader = accelerator.prepare(DataLoader(Pids(), batch_size=B, sampler=sampler, num_workers=1))
    drawn = []
    for window in acc.windows(loader, count_targets=len):
        drawn.append([])
        for batch in window:
            drawn[-1].append(len(sampler.drawn))
            with acc.accumulate(model):
                acc.backward(model(batch).sum(), reduction="sum")
        acc.step(optimizer)
    assert acc.num_updates == 3
    assert (len(set(drawn[0])) == 1) == together


@pytest.mark.usefixtures("fresh_accelerate")
def test_ready_batches_cannot_make_a_window_that_does_not_divide():
    acc = Accumulator(micro_batch_size=4, global_batch_size=10, cpu=True)
    rows = TensorDataset(torch.arange(30.0))
    for source in (DataLoader(rows, batch_size=4), iter([torch.ones(4)])):
        with pytest.raises(
            DataError, match="global_batch_size=10 is not a multiple of B 4 x W 1 = 4.*use 8 or 12"
        ):
            acc.windows(source)
    batches = acc.batches(rows, count_targets=lambda batch: len(batch[0]))
    assert len(batches.windows) == 3 and len(batches) == 9  # 4, 4 and 2, three times


@pytest.mark.usefixtures("fresh_accelerate")
def test_packed_batches_have_no_length_before_they_are_cut():
    """The lengths of each window decide how many it becomes."""
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    lengths = np.array([100, 100, *[1] * 6, *[100] * 8])
    batches = acc.batches(
        TensorDataset(torch.arange(16.0)),
        lengths=lengths,
        cut=Cut(2, packed=True),
        shuffle=False,
        count_targets=lambda batch: len(batch[0]),
    )
    assert len(batches.windows) == 2 and len(next(iter(batches.windows))) == 2  # of K = 4
    with pytest.raises(TypeError, match="how many micro-batches this source gives is not known"):
        len(batches)


# --- an order of the loader's own ---


class OwnOrder(torch.utils.data.Sampler):
    """Shuffles with numpy's generator, whose state is not part of a position."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        return iter(self.generator.permutation(SIZE).tolist())

    def __len__(self):
        return SIZE


class OwnTorchOrder(OwnOrder):
    def __iter__(self):
        return iter(torch.randperm(SIZE, generator=self.generator).tolist())


class OwnStream(IterableDataset):
    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        return iter([torch.tensor([float(i)]) for i in self.generator.permutation(SIZE)])


def seeded():
    return torch.Generator().manual_seed(3)


def pairs(**options):
    return DataLoader(torch.arange(SIZE).reshape(-1, B, 1).float(), batch_size=None, **options)


ORDERS = {
    "sampler on torch": lambda: DataLoader(
        samples(), batch_size=B, sampler=OwnTorchOrder(seeded())
    ),
    "ready batches": lambda: pairs(shuffle=True, generator=seeded()),
    "ready batches, sampler": lambda: pairs(sampler=RandomSampler(range(11), generator=seeded())),
    "ready batches, persistent": lambda: pairs(
        shuffle=True, generator=seeded(), num_workers=1, persistent_workers=True
    ),
    "stateful": lambda: Stateful(samples(), batch_size=B, shuffle=True, generator=seeded()),
    "sampler on numpy": lambda: DataLoader(
        samples(), batch_size=B, sampler=OwnOrder(np.random.default_rng(0))
    ),
    "stream on numpy": lambda: DataLoader(OwnStream(), batch_size=B),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_epoch_resumed_in_its_middle_sees_the_rest_of_it_or_is_refused(name):
    acc, *training = accumulator()
    batches = acc.batches(ORDERS[name](), count_targets=len)
    trained(acc, *training, batches)
    before = trained(acc, *training, batches, updates=1)
    saved = batches.state_dict()

    acc, *training = accumulator()
    batches = acc.batches(ORDERS[name](), count_targets=len)
    batches.load_state_dict(saved)
    if "numpy" in name:
        with pytest.raises(DataError, match=r"other batches than before in epoch 1.*Generator"):
            trained(acc, *training, batches)
    else:
        after = trained(acc, *training, batches)
        assert sorted(before + after) == list(range(SIZE))


def test_what_a_cut_of_other_windows_skips_is_not_compared_by_content():
    """Random content depends on the window that it is read in."""
    acc, *training = accumulator()
    batches = acc.batches(DataLoader(OwnStream(), batch_size=B), count_targets=len)
    trained(acc, *training, batches)
    trained(acc, *training, batches, updates=1)
    crc, at_once = batches.state_dict()["consumed_crc"]
    batches.load_state_dict(batches.state_dict() | {"consumed_crc": (crc, at_once + 1)})
    trained(acc, *training, batches)


# --- samples of several lengths ---


@pytest.mark.parametrize(
    ("data", "differ", "workers"),
    [
        ([torch.ones(1), torch.ones(2)], r"size: \(1,\), \(2,\)", 0),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}], "input_ids: 3, 2", 1),
        ([(torch.ones(1), torch.ones(1)), (torch.ones(1), torch.ones(3))], r"\[1\]: ", 0),
    ],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_ragged_samples_without_a_collate_fn_are_told_the_remedy(data, differ, workers):
    acc = Accumulator(micro_batch_size=2, cpu=True)
    windows = acc.windows(data, count_targets=len, shuffle=False, num_workers=workers)
    with pytest.raises(DataError, match=differ + r"[\s\S]*collate_fn[\s\S]*PaddingCollator"):
        next(iter(windows))
