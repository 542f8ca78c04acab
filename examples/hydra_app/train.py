"""A Hydra application whose K is a policy: `python train.py accumulate_grad_batches=high`.

conf/config.yaml names the policy; the group comes with accum_trainer (the extra `hydra`).
"""

import hydra
import torch
from torch.utils.data import TensorDataset

from accum_trainer import Accumulator


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    acc = Accumulator(**cfg.accumulator)
    print(acc.plan.describe())
    model = torch.nn.Linear(3, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), **cfg.optimizer))
    inputs = torch.randn(64, 3)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    windows = acc.windows(data, count_targets=lambda batch: len(batch[1]))
    for _ in range(cfg.epochs):
        for window in windows:
            for x, y in window:
                with acc.accumulate(model):
                    acc.backward(((model(x) - y) ** 2).mean(), reduction="mean")
            update = acc.step(optimizer)
    print(f"updates {update.step}  loss {update.loss:.4f}")


main()
