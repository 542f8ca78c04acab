"""Train where memory really runs out: the address space is limited, and a micro-batch of 16 does
not fit into it.

python -m tests.exhausting
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from accum_trainer import Accumulator

WIDTH, MEGABYTES = 2_000_000, 330  # a sample's activations take 16 MB twice; 16 of them 512 MB


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).relu().square()


def train(model: Wide, x: torch.Tensor) -> dict[str, float]:
    """Gradient of mean over samples of sum(relu(x w)^2): 2 relu(x w) x, by hand; one update per 16
    samples."""
    exact = sum(
        2 * (s.double() * model.weight.detach().double()).relu() * s.double() for s in x
    ) / len(x)
    acc = Accumulator(micro_batch_size=16, global_batch_size=16, cpu=True)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    window = next(
        iter(
            acc.windows(TensorDataset(x), shuffle=False, count_targets=lambda batch: len(batch[0]))
        )
    )
    given = []
    for (part,) in window:
        given.append(len(part))
        with acc.accumulate(model):
            acc.backward(model(part).sum(), reduction="sum")
    error = ((model.weight.grad.double() - exact).norm() / exact.norm()).item()  # type: ignore[union-attr]
    return {"error": error, "given": given, "num_splits": acc.step(optimizer).num_splits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, x = Wide(), torch.linspace(-1, 1, 16).unsqueeze(1)
    Accumulator(micro_batch_size=1, cpu=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(train(model, x)))
