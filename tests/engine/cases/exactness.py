"""Updates against one float64 big batch, from each kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer import causal_lm_loss
from tests.engine.cases.probing import (
    Probe,
    accumulator,
    case,
    compare,
    lengths,
    models_own_mean,
    planned,
    rank,
    summed,
    world_size,
)
from tests.reference import make_model, make_rows, pad


def _planned_case(kind: str, **options: Any) -> dict[str, Any]:
    rows = make_rows(37, all_masked=(3, 4, 8))
    acc = accumulator(3, global_batch_size=12, **options)
    probe = Probe(acc, make_model(kind))
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows))
    return compare(probe, windows, planned(rows, 12)) | {"length": len(windows)}


@case
def planned_llama() -> dict[str, Any]:
    return _planned_case("llama")


@case
def planned_gpt2() -> dict[str, Any]:
    return _planned_case("gpt2")


@case
def planned_lora() -> dict[str, Any]:
    return _planned_case("lora")


@case
def planned_every_microbatch() -> dict[str, Any]:
    return _planned_case("llama", grad_sync="every-microbatch")


@case
def planned_checkpointing() -> dict[str, Any]:
    rows = make_rows(37, all_masked=(3, 4, 8))
    model = make_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, model.train())
    return compare(probe, acc.windows(rows, collate_fn=pad), planned(rows, 12))


@case
def planned_with_workers() -> dict[str, Any]:
    rows = make_rows(37)
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad, num_workers=1), planned(rows, 12))


def _loader_case(kind: str, loss: Any, rows: list[dict]) -> dict[str, Any]:
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model(kind))
    loader = DataLoader(rows, batch_size=3, collate_fn=pad)
    expected = [rows[begin : begin + 12] for begin in range(0, len(rows), 12)]
    return compare(probe, acc.windows(loader), expected, loss)


@case
def loader_llama_own_mean() -> dict[str, Any]:
    # Rows 6 to 8 are one micro-batch without a target, whose own mean is nan; 35 rows leave an odd
    # tail.
    return _loader_case("llama", models_own_mean, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_lora_own_mean() -> dict[str, Any]:
    return _loader_case("lora", models_own_mean, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_gpt2_sum() -> dict[str, Any]:
    return _loader_case("gpt2", summed, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_shuffled_every_sample_once() -> dict[str, Any]:
    rows = [{"input_ids": [1, 2 + i], "labels": [1, 2 + i]} for i in range(35)]
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model("llama"))
    torch.manual_seed(rank())  # ranks whose own seeds differ still agree on the order
    windows = acc.windows(DataLoader(rows, batch_size=3, shuffle=True, collate_fn=pad))
    orders = []
    for _ in range(2):
        seen: list[int] = []
        for window in windows:
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
                seen += (batch["input_ids"][:, 1] - 2).tolist()
            probe.step()
        orders.append([index for part in acc.engine.gather_objects(seen) for index in part])
    return {"orders": orders}


@case
def stream_unsized() -> dict[str, Any]:
    """Ranks hold different numbers of batches of different sizes, and end in the middle of a
    window."""
    rows = make_rows(41)
    per_rank = [rows] if world_size() == 1 else [rows[:26], rows[26:]]

    def batches(of: int) -> Iterator[list[dict]]:
        mine = per_rank[of]
        for begin in range(0, len(mine), 3):
            yield mine[begin : begin + 3]

    acc = accumulator(3, gradient_accumulation_steps=4 // world_size())
    probe = Probe(acc, make_model("llama"))
    expected: list[list[dict]] = []
    k = acc.plan.gradient_accumulation_steps
    for of in range(world_size()):
        for index, batch in enumerate(batches(of)):
            while len(expected) <= index // k:
                expected.append([])
            expected[index // k] += batch
    windows = acc.windows(pad(batch) for batch in batches(rank()))
    return compare(probe, windows, expected) | {"gradients_left": probe.left()}
