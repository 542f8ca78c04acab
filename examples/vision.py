"""Classify images with a convolutional network in plain PyTorch, without transformers.

GroupNorm in place of BatchNorm: BatchNorm takes its statistics over a micro-batch, so its update
would depend on the cut, and the library refuses it.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from accum_trainer import Accumulator


class Stripes(Dataset):
    """Noisy images of 3 x 16 x 16 with horizontal (0) or vertical (1) stripes."""

    def __len__(self):
        return 72

    def __getitem__(self, index):
        waves = torch.sin(torch.arange(16.0) + index).expand(3, 16, 16)
        image = waves if index % 2 else waves.transpose(1, 2)
        return image + 0.5 * torch.randn(3, 16, 16), index % 2  # seeded by epoch and batch


torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2), nn.GroupNorm(4, 32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
acc = Accumulator(micro_batch_size=8, gradient_accumulation_steps=2)
model, optimizer = acc.prepare(model, optimizer)
windows = acc.windows(
    DataLoader(Stripes(), batch_size=8, shuffle=True), count_targets=lambda batch: len(batch[1])
)

for epoch in range(3):
    for window in windows:  # four of 16 images, and one of 8
        correct = 0
        for images, labels in window:
            with acc.accumulate(model):
                logits = model(images)
                acc.backward(cross_entropy(logits, labels), reduction="mean")
            correct += int((logits.argmax(1) == labels).sum())
        update = acc.step(optimizer)
    print(f"epoch {epoch}  loss {update.loss:.4f}  correct {correct} of {update.num_samples}")
