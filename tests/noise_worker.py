"""The noise scale of a model whose gradient has a closed form, by B, B_eff and layout.

A unigram model gives every target t the gradient p - onehot(t), p = softmax(logits). With targets
drawn from q, a sample of n targets has

    mu = E n (p - q),   Sigma about n mu / E n:   E n (diag q - q q'),

so tr(Sigma) / |mu|^2 = (1 - |q|^2) / (E n |p - q|^2).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from accum_trainer import Accumulator, causal_lm_loss
from accum_trainer.errors import DataError
from accum_trainer.sources.collating import PackingCollator
from tests.reference import pad

VOCABULARY = 40
LENGTHS = (2, 4, 8, 14)  # targets of a sample, each as likely


class Unigram(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.linspace(-0.2, 0.2, VOCABULARY))

    def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, VOCABULARY))


def frequencies() -> np.ndarray:
    q = np.linspace(1.0, 16.0, VOCABULARY)
    return q / q.sum()


def closed_form() -> float:
    """Samples."""
    q, p = frequencies(), Unigram().logits.softmax(-1).detach().numpy()
    signal = ((p - q) ** 2).sum()
    return float((1 - (q**2).sum()) / (np.mean(LENGTHS) * signal))


def make_samples(count: int) -> list[dict]:
    rng = np.random.RandomState(0)
    found = []
    for _ in range(count):
        ids = rng.choice(VOCABULARY, rng.choice(LENGTHS) + 1, p=frequencies()).tolist()
        found.append({"input_ids": ids, "labels": ids})
    return found


def alike(count: int) -> list[dict]:
    """Samples whose targets all have one gradient: what differs is how many each has."""
    rng = np.random.RandomState(0)
    return [
        {"input_ids": [1] * (n + 1), "labels": [1] * (n + 1)} for n in rng.choice(LENGTHS, count)
    ]


def measured(
    layout: str,
    micro_batch_size: int,
    size: int,
    epochs: int,
    samples: list[dict],
    noise_every: int = 1,
) -> dict:
    acc = Accumulator(micro_batch_size=micro_batch_size, global_batch_size=size, cpu=True)
    model = Unigram()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    collate = pad if layout == "padded" else PackingCollator()
    windows = acc.windows(samples, collate_fn=collate, noise_every=noise_every)
    for _ in range(epochs):
        for window in windows:
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(causal_lm_loss(model, batch))
            acc.step(optimizer)
    found = windows.noise.estimate
    return vars(found) | {"obstacle": windows.noise.obstacle}


def differing(rank: int) -> str:
    """The error if process 0 measures every second window and process 1 none."""
    try:
        measured("padded", 8, 48, 1, make_samples(200), noise_every=2 * (rank == 0))
    except DataError as error:
        return str(error)
    return ""


def main(out: str, what: str = "measured") -> None:
    rank = os.environ.get("RANK", "0")
    if what == "differing":
        Path(out, f"rank{rank}.json").write_text(json.dumps(differing(int(rank))))
        return
    samples = make_samples(3072)
    found = {
        f"{layout} B={b} B_eff={size}": measured(layout, b, size, epochs, samples)
        for layout in ("padded", "packed")
        for b, size, epochs in ((8, 48, 2), (32, 32, 2))
    }
    found["alike"] = measured("padded", 8, 32, 2, alike(3072))
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
