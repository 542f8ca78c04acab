"""Verify the planted loops, all in one process or one launch: a JSON of their reports.

python -m tests.verify_loops.worker OUT.json NAME ...
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from accum_trainer import Accumulator, BatchPlan
from accum_trainer.verify.loop import verify_loop
from accum_trainer.verify.plain_accelerate import plain_engine
from accum_trainer.verify.training import Subject, verify
from tests.reference import IGNORE, VOCABULARY, make_model, make_rows, pad
from tests.verify_loops import correct, faults

# K differs from the 2 processes of a launch: with K = W some faults look alike.
STEPS, MAX_GRAD_NORM = 3, 0.3


def verify_named(name: str, world_size: int = 1) -> dict[str, Any]:
    """The report on one loop of `correct` or `faults`, as a dictionary."""
    loop = getattr(correct, name, None) or getattr(faults, name)
    engine = plain_engine(STEPS, cpu=True, mixed_precision="no")
    # Clipping is active in every window where a loop clips; elsewhere it is off, or it could hide a
    # factor.
    max_grad_norm = MAX_GRAD_NORM if "clip" in name else None
    plan = BatchPlan(2, STEPS, world_size)
    # As data of prompts and answers: the first label of every row is masked.
    rows = [{**row, "labels": [IGNORE, *row["labels"][1:]]} for row in make_rows(40)]
    # One row far longer than all others; it has a window of its own.
    ids = [1 + i % (VOCABULARY - 1) for i in range(120)]
    rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    return verify_loop(
        loop, engine, lambda: make_model("llama"), rows, plan, max_grad_norm
    ).to_dict()


class WithBatchNorm(torch.nn.Module):
    """A model that nobody can cut: its statistics are over the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = (
            torch.nn.Embedding(97, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Linear(8, 97),
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))


def model_that_nobody_can_split(world_size: int) -> dict[str, Any]:
    """The report on a loop whose model has BatchNorm; the loop is not run."""
    engine = plain_engine(STEPS, cpu=True, mixed_precision="no")
    return verify_loop(
        faults.does_nothing, engine, WithBatchNorm, make_rows(20), BatchPlan(2, STEPS, world_size)
    ).to_dict()


def training_that_parts_the_ranks() -> dict[str, Any]:
    """The package's own loop, under an optimizer that adds something of its own on each rank."""
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=STEPS, cpu=True)
    model, optimizer = acc.prepare(
        llama := make_model("llama"), torch.optim.SGD(llama.parameters(), lr=0.1)
    )

    def push(*_: Any) -> None:
        with torch.no_grad():
            llama.lm_head.weight += 0.1 * acc.engine.rank

    optimizer.optimizer.register_step_post_hook(push)
    rows = make_rows(14)
    windows = acc.windows(rows, collate_fn=pad)
    return verify(
        Subject(acc, model, optimizer, windows, rows, lambda: make_model("llama"))
    ).to_dict()


def main(out: str, *names: str) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:  # a loop that hangs must fail the launch
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
    reports = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        if name == training_that_parts_the_ranks.__name__:
            reports[name] = training_that_parts_the_ranks()
        elif name == model_that_nobody_can_split.__name__:
            reports[name] = model_that_nobody_can_split(world_size)
        else:
            reports[name] = verify_named(name, world_size)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(reports))
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
