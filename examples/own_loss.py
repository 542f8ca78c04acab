"""A loss of your own: rows with importance weights, and label smoothing.

A window's loss is sum(weight * loss) / sum(weight) over all its rows. So `count_targets` returns
the sum of the weights of a batch, and the loss is passed on as a sum. No cut changes the update.
"""

import sys

import torch
from torch.nn.functional import cross_entropy

from accum_trainer import Accumulator

torch.manual_seed(0)
inputs = torch.randn(50, 8)
rows = [{"x": x, "y": int(x[:3].argmax()), "weight": 1.0 + 3.0 * float(x[3] > 0)} for x in inputs]
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))


def weighted_sum(batch):
    """Sum over rows of weight times the smoothed cross entropy."""
    losses = cross_entropy(model(batch["x"]), batch["y"], reduction="none", label_smoothing=0.1)
    return (losses * batch["weight"]).sum()


micro_batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 4
acc = Accumulator(micro_batch_size=micro_batch_size, global_batch_size=16)
model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
windows = acc.windows(rows, count_targets=lambda batch: float(batch["weight"].sum()))

for _ in range(10):  # each loop is the next epoch
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(weighted_sum(batch), reduction="sum")
        update = acc.step(optimizer)
print(f"updates {update.step}  loss {update.loss:.6f}")
