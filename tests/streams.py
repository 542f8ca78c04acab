"""Streams given to two processes, run by test_sources under torchrun: python -m tests.streams
OUT."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from accum_trainer import AccumTrainerError, Accumulator, DataError

RANK, W = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rows(*, begin: int = 0) -> Iterator[torch.Tensor]:
    """Batches of two samples, all different."""
    return (torch.tensor([[2.0 * i], [2.0 * i + 1]]) for i in range(begin, 12))


def tiny() -> Iterator[torch.Tensor]:
    """Batches of two samples with one of two values: equal batches are no sign of anything."""
    return (torch.tensor([[i % 2], [i // 2 % 2]]).float() for i in range(12))


def masked() -> Iterator[dict[str, torch.Tensor]]:
    """The first tensor of each batch is the same everywhere; the data are not."""
    return ({"mask": torch.ones(2, 1), "x": batch} for batch in islice(rows(), RANK, None, W))


ALL = [torch.tensor([2.0 * i]) for i in range(24)]


class SplitByRank(IterableDataset):
    """Each rank's own samples, which begin with a mask that is the same everywhere."""

    def __iter__(self):
        return ({"mask": torch.ones(1), "x": x} for x in ALL[RANK::W])


class OwnNoise(Dataset):
    """All samples, with noise from a generator of each rank."""

    rng = np.random.default_rng(RANK)

    def __len__(self):
        return len(ALL)

    def __getitem__(self, index):
        return ALL[index] + float(self.rng.normal())


class WithPaths(OwnNoise):
    """All samples, with the path of a file on this machine's own disk."""

    def __getitem__(self, index):
        path = Path(sys.argv[1], f"machine-{RANK}", "sample")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return {"x": ALL[index], "path": str(path)}


def mine() -> Dataset:
    return Subset(ALL, range(RANK, len(ALL), W))


# name -> (the stream of this rank, K)
STREAMS: dict[str, tuple[Callable[[], Any], int]] = {
    "the same, K=4": (rows, 4),
    "the same, K=1": (rows, 1),
    "the same dictionaries": (
        lambda: ({"mask": torch.ones(2, 1), "x": batch} for batch in rows()),
        4,
    ),
    "split": (lambda: islice(rows(), RANK, None, W), 2),
    "split, equal masks": (masked, 2),
    "one batch again and again": (lambda: repeat(torch.arange(16.0).reshape(16, 1), 6), 2),
    "constant": (lambda: repeat(torch.ones(2, 1), 200), 100),
    "tiny": (tiny, 4),
    "a data set split by rank": (mine, 2),
    "a loader split by rank": (lambda: DataLoader(mine(), batch_size=2, shuffle=True), 2),
    "workers over a data set split by rank": (
        lambda: DataLoader(mine(), batch_size=2, num_workers=1),
        2,
    ),
    "an iterable split by rank": (lambda: DataLoader(SplitByRank(), batch_size=2), 2),
    "a whole data set": (lambda: ALL, 2),
    "workers over a whole data set": (lambda: DataLoader(ALL, batch_size=2, num_workers=1), 2),
    "a whole data set with noise": (OwnNoise, 2),
    "a whole data set with paths": (WithPaths, 2),
    "equal at first": (lambda: [*islice(rows(), 1), *rows(begin=1 + 5 * RANK)].__iter__(), 2),
}


def train(stream: Any, k: int) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=k, cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    raised = ""
    try:
        for window in acc.windows(
            stream, count_targets=lambda b: len(b["x"] if isinstance(b, dict) else b)
        ):
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(
                        model(batch["x"] if isinstance(batch, dict) else batch).sum(),
                        reduction="sum",
                    )
            acc.step(optimizer)
    except DataError as error:
        raised = str(error)
    return {"updates": acc.num_updates, "raised": raised}


def leave_early() -> dict[str, Any]:
    """Rank 1 leaves the first epoch after two updates and begins the next one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    source = list(torch.arange(32.0).reshape(32, 1))
    raised = ""
    try:
        for epoch in range(2):
            for number, window in enumerate(acc.windows(source, count_targets=len)):
                for batch in window:
                    with acc.accumulate(model):
                        acc.backward(model(batch).sum(), reduction="sum")
                acc.step(optimizer)
                if RANK == 1 and epoch == 0 and number == 1:
                    break
    except (AccumTrainerError, RuntimeError) as error:
        raised = f"{type(error).__name__}: {error}"
    return {"updates": acc.num_updates, "raised": raised}


def main(out: str) -> None:
    found = {name: train(make(), k) for name, (make, k) in STREAMS.items()}
    found["left early"] = leave_early()
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"rank{RANK}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
