"""A small loop under the guards, and the same by hand on the whole batch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from accum_trainer import Accumulator

B, K, SAMPLES = 2, 4, 32


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 2, generator=generator)
    )


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def squares(model: torch.nn.Module, batch) -> torch.Tensor:
    inputs, wanted = batch
    return ((model(inputs) - wanted) ** 2).sum()


def count(batch) -> int:
    return len(batch[0])


PREPARED_BY = pytest.mark.parametrize("prepared_by", ["acc", "accelerate"])


def start(optimizers=1, prepare=True, prepared_by="acc", **options):
    model = network()
    halves = [list(model[0].parameters()), list(model[2].parameters())]
    groups = halves if optimizers == 2 else [[p for half in halves for p in half]]
    raw = [torch.optim.SGD(group, lr=0.1) for group in groups]
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K, **options)
    if prepare:
        prepare_all = acc.prepare if prepared_by == "acc" else acc.accelerator.prepare
        model, *raw = prepare_all(model, *raw)
    return acc, model, raw


def batches(acc):
    return acc.batches(DataLoader(data(), batch_size=B), count_targets=count)


def accumulate(acc, model, batch):
    with acc.accumulate(model):
        acc.backward(squares(model, batch), reduction="sum")


def update_by_hand(model, optimizer, window):
    """One update from the whole window."""
    optimizer.zero_grad()
    (squares(model, window) / len(window[0])).backward()
    optimizer.step()


def windows_by_hand():
    inputs, wanted = data().tensors
    step = B * K
    for begin in range(0, SAMPLES, step):
        yield inputs[begin : begin + step].double(), wanted[begin : begin + step].double()


def assert_same(model, exact):
    for found, truth in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)
