"""Faults of one rank before the first window, run under torchrun: python -m tests.first_window
OUT."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from accum_trainer import Accumulator

RANK = int(os.environ["RANK"])


class Scalar(torch.nn.Module):
    """Returns its own loss, which is then compared with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).mean()


def train(batches: Any, count: Any) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=1, cpu=True)
    plain = Scalar()
    model, optimizer = acc.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    try:
        for window in acc.windows(batches, count_targets=count):
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(model(batch), reduction="mean")
            acc.step(optimizer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def counts_elsewhere(batch: Any) -> int:
    return len(batch) if RANK == 0 else {}["nothing of this name"]


def main(out: str) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    mine = [torch.full((2, 1), float(10 * RANK + i)) for i in range(3)]
    found = {
        "a count that raises": train(iter(mine), counts_elsewhere),
        "a rank without data": train(iter(mine if RANK == 0 else []), len),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"rank{RANK}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
