"""`find_batch_size` finds the largest micro-batch by trial and leaves nothing behind.

Two processes: test_recovery.py.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from accum_trainer import Accumulator, ConfigError, EngineError, TrainConfig
from accum_trainer.engine import memory as engine_memory
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.speed.batch_size import Memory, find_batch_size
from accum_trainer.train import updates
from tests.recovering import MadeUpMemory
from tests.reference import make_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "quick_collections")

RESERVE = 214784  # two moments of 26,848 float32 parameters


def made(kind="llama"):
    acc = Accumulator(micro_batch_size=1, cpu=True)
    model = make_model(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    return acc.engine, *acc.prepare(model, torch.optim.AdamW(trained))


def search(memory, most=12, longest=16, parts=None):
    engine, model, optimizer = parts or made()
    return find_batch_size(engine, model, optimizer, memory.collate, longest, most, memory)


@pytest.mark.parametrize(
    ("fits", "tried"),
    [
        (7, [1, 2, 4, 7]),  # the line says 7, and that 8 does not fit
        (1, [1]),
        (12, [1, 2, 4, 8, 12]),
        (30, [1, 2, 4, 8, 12]),  # 12 are all that a rank can have
    ],
)
def test_sizes_double_up_to_where_the_line_ends(fits, tried):
    found = search(MadeUpMemory(RESERVE + 105e3 + fits * 10e3))
    assert found.micro_batch_size == min(fits, 12)
    assert found.max_tokens == 16 * found.micro_batch_size
    assert list(found.tried) == tried
    assert found.needed_gb == pytest.approx(
        (RESERVE + 100e3 + found.micro_batch_size * 10e3) / 1e9, abs=1e-3
    )


def test_where_the_line_bends_the_middle_is_tried():
    """Memory runs out above 5, against the prediction."""
    found = search(MadeUpMemory(1e9, most=5))
    assert found.micro_batch_size == 5
    assert found.tried.keys() == {1, 2, 4, 5, 6, 8}
    assert found.tried[8] is None and found.tried[6] is None
    assert "5 samples of 16 tokens, 80 tokens per micro-batch" in found.describe()


def test_not_even_one_sample():
    with pytest.raises(
        ConfigError, match="one sample of 16 tokens needs 0.00 GB, and 0.00 GB are free"
    ):
        search(MadeUpMemory(RESERVE))
    with pytest.raises(
        ConfigError, match="one sample of 16 tokens needs more memory than there is"
    ):
        search(MadeUpMemory(1e9, most=0))


def test_an_engine_whose_processes_cannot_go_on_alone_says_so():
    parts = made()
    parts[0].equal_micro_batches = True
    with pytest.raises(
        EngineError,
        match="8 samples ran out of memory, and single cannot go on .* give batch_size as a",
    ):
        search(MadeUpMemory(1e9, most=5), parts=parts)


def test_other_errors_pass():
    memory = MadeUpMemory(1e9)
    memory.collate = lambda samples: {
        "input_ids": torch.full((1, 4), 999),
        "labels": torch.zeros(1, 4).long(),
    }
    with pytest.raises(IndexError):
        search(memory)


def test_nothing_is_left_behind():
    engine, model, optimizer = parts = made("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    torch.manual_seed(3)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before, asked = torch.get_rng_state(), engine.optimizer_bytes(optimizer.accelerated)
    assert asked == 8 * sum(p.numel() for p in model.parameters())
    search(MadeUpMemory(asked + 135e3), parts=parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not optimizer.state


def test_state_that_is_there_is_not_counted_again():
    engine, model, optimizer = made("lora")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert engine.optimizer_bytes(optimizer.accelerated) == 8 * sum(p.numel() for p in trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.optimizer.step()
    assert engine.optimizer_bytes(optimizer.accelerated) == 0


def test_resident_memory_of_real_forwards():
    """Memory grows from 1 to 8 samples; with a limit halfway between 4 and 8, the answer is between
    them."""
    parts = made()

    class Room(Memory):
        def limit(self, processes):
            return self.room

    def tried(room):
        memory = Room(torch.device("cpu"))
        memory.room = room
        return find_batch_size(*parts, PaddingCollator(0), 256, 8, memory)

    free = tried(1e12)
    assert list(free.tried) == [1, 2, 4, 8]
    sizes = list(free.tried.values())
    assert sizes == sorted(sizes)
    assert sizes[3] - sizes[2] > 2e-3  # four samples more take megabytes
    limited = tried((free.tried[4] + free.tried[8]) / 2 * 1e9)
    assert 4 <= limited.micro_batch_size < 8
    assert limited.needed_gb <= limited.limit_gb


def test_a_cpu_is_shared_by_the_processes_on_it():
    memory = Memory(torch.device("cpu"))
    alone, shared = memory.limit(1), memory.limit(4)
    assert memory.in_use() < shared < alone


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (
            {
                "memory.max": "1000\n",
                "memory.current": "700\n",
                "memory.stat": "anon 5\ninactive_file 50\n",
            },
            350.0,
        ),
        ({"memory.max": "max\n", "memory.current": "700\n", "memory.stat": ""}, math.inf),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "total_inactive_file 25\n",
            },
            125.0,
        ),
        ({}, math.inf),
    ],
)
def test_what_a_container_may_still_take(tmp_path, files, free):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert engine_memory.free_in_cgroup(tmp_path) == free


def test_the_trainer_finds_it_keeps_the_effective_batch_and_writes_it_down(tmp_path):
    config = TrainConfig(
        batch_size="auto",
        global_batch_size=6,
        steps=1,
        max_seq_len=64,
        cpu=True,
        output_dir=str(tmp_path / "run"),
    )
    (record,) = updates(config)
    assert record["effective_batch_size"] == 6
    found = json.loads((tmp_path / "run" / "plan.json").read_text())["batch_size_found"]
    assert (found["micro_batch_size"], found["max_tokens"]) == (6, 384)
    assert found["tried"].keys() == {"1", "2", "4", "6"}
    assert found["needed_gb"] <= found["limit_gb"]
