"""Samples to one padded micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from accum_trainer.data.tokenizing import IGNORE


@dataclass(frozen=True)
class PaddingCollator:
    """Pad samples on the right to the longest of them.

    Called with samples of `input_ids` and `labels` (lists of ints), gives tensors of shape (samples, longest), int64:
    `input_ids` padded with `pad_token_id`, `attention_mask` (1 on tokens, 0 on padding), `labels` padded with -100.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = torch.tensor(sample["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(sample["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
