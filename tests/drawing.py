"""What is drawn at random in a training, by seed, rank and epoch: run by test_seeds under torchrun.

python -m tests.drawing OUT: writes rank0.json, rank1.json.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from accum_trainer import Accumulator, TrainConfig
from accum_trainer.train.setup import assemble

SEEDS = (0, 1, 1 << 32)
SIZE, B, B_EFF = 24, 2, 8


class Augmented:
    """Sample i is (i, a number of each of the three global generators)."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(
            [float(index), torch.rand(()).item(), np.random.rand(), random.random()]
        )


class Shuffled(Sampler):
    """A sampler that draws its order from numpy's global generator."""

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Any:
        return iter(np.random.permutation(SIZE).tolist())


class Stream(IterableDataset):
    """The same, shuffled, each worker with a share."""

    def __iter__(self) -> Any:
        worker = get_worker_info()
        share = range(SIZE)[worker.id :: worker.num_workers] if worker else range(SIZE)
        return (Augmented()[share[i]] for i in torch.randperm(len(share)).tolist())


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read(
    source: Any, position: dict[str, int] | None = None, **options: Any
) -> list[list[list[float]]]:
    """This rank's samples of two epochs, or of the rest of the epoch of `position`, in the order
    of training."""
    fresh()
    acc = Accumulator(micro_batch_size=B, global_batch_size=B_EFF, cpu=True)
    model = torch.nn.Linear(4, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    windows = acc.windows(source, count_targets=len, **options)
    if position is not None:
        windows.load_state_dict(position)
    epochs: list[list[list[float]]] = []
    for _ in range(2 if position is None else 1):
        epochs.append([])
        for window in windows:
            for batch in window:
                epochs[-1] += batch.tolist()
                with acc.accumulate(model):
                    acc.backward(model(batch).sum(), reduction="sum")
            acc.step(optimizer)
    return epochs


def loader(**options: Any) -> DataLoader:
    return DataLoader(Augmented(), batch_size=B, **({"shuffle": True} | options))


SOURCES: dict[str, Any] = {
    "loader": lambda: (loader(), {}),
    "loader, workers": lambda: (loader(num_workers=2), {}),
    "loader, persistent workers": lambda: (loader(num_workers=1, persistent_workers=True), {}),
    "loader, a sampler that draws": lambda: (loader(sampler=Shuffled(), shuffle=None), {}),
    "stream": lambda: (DataLoader(Stream(), batch_size=B), {}),
    "stream, workers": lambda: (DataLoader(Stream(), batch_size=B, num_workers=2), {}),
    "data set": lambda: (Augmented(), {}),
    "data set, workers": lambda: (Augmented(), {"num_workers": 2}),
}


def main(out: str) -> None:
    rank = int(__import__("os").environ["RANK"])
    torch.manual_seed(5)
    found: dict[str, Any] = {"dropout": {}, "reading": {}}
    for seed in (*SEEDS, SEEDS[0]):
        fresh()
        assemble(TrainConfig(cpu=True, steps=1, seed=seed, batch_size=1, max_seq_len=16))
        found["dropout"].setdefault(str(seed), []).append(torch.rand(4).tolist())
    for name, make in SOURCES.items():
        runs: dict[str, Any] = {}
        for seed in (*SEEDS, SEEDS[0]):
            torch.manual_seed(1000 + rank)  # a script whose ranks have other seeds
            source, options = make()
            runs.setdefault(str(seed), []).append(read(source, seed=seed, **options))
        source, options = make()
        unit = "samples" if name.startswith("data set") else "batches"
        position = {"epoch": 1, f"{unit}_consumed": B_EFF if unit == "samples" else B_EFF // B}
        runs["resumed"] = read(source, position, seed=SEEDS[0], **options)
        # Reading draws nothing from the stream that dropout uses.
        torch.manual_seed(7)
        read(make()[0], position, seed=SEEDS[0], **options)
        torch.nn.Linear(4, 1)
        after = torch.rand(4).tolist()
        torch.manual_seed(7)
        torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        runs["training draws as without reading"] = after == torch.rand(4).tolist()
        found["reading"][name] = runs
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
