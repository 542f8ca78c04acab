"""Samples to one micro-batch: padded to a rectangle, or packed end to end.

Knows the keys of transformers' batches, but no tokenizer and no window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import default_collate

from accum_trainer.batch import BOUNDARIES, IGNORE, boundaries_of
from accum_trainer.errors import ConfigError, DataError

Sample = Mapping[str, Sequence[int]]


def collated(samples: list[Any]) -> Any:
    """torch's default: samples of equal shapes, stacked.

    Raises:
        DataError: a field has several lengths or shapes.
    """
    try:
        return default_collate(samples)
    except RuntimeError:
        ragged = _ragged(samples)
        if not ragged:
            raise
    raise DataError(
        f"the samples of a micro-batch differ in {ragged}, and without a collate_fn they are "
        "stacked, which takes equal shapes; pass a collate_fn that pads them, such as "
        "accum_trainer.sources.collating.PaddingCollator(pad_token_id) for input_ids and labels"
    )


def _ragged(samples: Sequence[Any]) -> str:
    """The first field of several sizes, with these; "" if there is none."""
    first = samples[0]
    if isinstance(first, Mapping):
        fields = {str(key): [sample.get(key) for sample in samples] for key in first}
    elif isinstance(first, tuple):
        fields = {f"[{i}]": [sample[i] for sample in samples] for i in range(len(first))}
    else:
        fields = {"size": list(samples)}
    for name, values in fields.items():
        sizes = [_size(value) for value in values]
        if len(set(sizes)) > 1:
            return f"{name}: {', '.join(map(str, dict.fromkeys(sizes)))}"
    return ""


def _size(value: Any) -> Any:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return len(value) if isinstance(value, Sequence) else ()


@dataclass(frozen=True)
class PaddingCollator:
    """Pad samples on the right to the longest of them, rounded up to a multiple.

    Called with samples of `input_ids` and `labels` (lists of ints), returns tensors of shape
    (samples, longest), int64: `input_ids` padded with `pad_token_id`, `attention_mask` (1 on
    tokens, 0 on padding), `labels` padded with -100.

    Args:
        pad_token_id: fills `input_ids`.
        multiple: the padded length is a multiple of it, in tokens.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), -(-longest // self.multiple) * self.multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = torch.tensor(sample["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(sample["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class PackingCollator:
    """Lay samples end to end in one row, without padding; positions restart with each sample.

    Returns `input_ids`, `labels` and `position_ids` of shape (1, tokens), int64, and no attention
    mask: transformers makes attention block-diagonal when positions restart. A sample's first label
    is -100, since the sample before would predict it. `losses.packing` proves on the model that it
    keeps the samples apart.

    Args:
        boundaries: further keys of the row, from `BOUNDARIES`; see `boundaries_of`.

    Raises:
        ConfigError: an unknown boundary.
    """

    boundaries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.boundaries if name not in BOUNDARIES]
        if unknown:
            raise ConfigError(
                f"boundaries={self.boundaries} holds {unknown[0]!r}; give some of "
                f"{', '.join(BOUNDARIES)}"
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor | int]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for sample in samples:
            ids += sample["input_ids"]
            labels += [IGNORE, *sample["labels"][1:]]
            positions += range(len(sample["input_ids"]))
        columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
        row: dict[str, torch.Tensor | int] = {
            name: torch.tensor([values]) for name, values in columns.items()
        }
        if self.boundaries:
            row |= boundaries_of([len(sample["input_ids"]) for sample in samples], self.boundaries)
        return row
