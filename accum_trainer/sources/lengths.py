"""The lengths of a data set's samples where they can be had without reading them one by one.

They only decide which samples share a micro-batch, so none at all is right, too. Knows the columns
of `datasets` and samples in memory; makes no batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

_IDS, _LENGTH = "input_ids", "length"
# Rows of a table that are looked at together.
_TOGETHER = 10_000
_known: weakref.WeakKeyDictionary[Any, np.ndarray | None] = weakref.WeakKeyDictionary()


def find_lengths(dataset: Any) -> np.ndarray | None:
    """Tokens of each sample, shape (samples,), int64; None if they are not at hand.

    From the attribute `lengths`, if it is a row of numbers; the column `input_ids`, or else
    `length`, of a `datasets.Dataset`; the `input_ids` of samples in a list or tuple.
    """
    found = np.asarray(getattr(dataset, "lengths", None))
    if found.ndim == 1 and found.dtype.kind in "iuf":  # else the name means something else
        return found
    if any(_is_read_as(kind, dataset) for kind in (list, tuple)):
        return _of_samples(dataset)
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list) and hasattr(dataset, "with_format"):
        # A transform may give samples that have little to do with the columns.
        if getattr(dataset, "format", {}).get("type") == "custom":
            return None
        if dataset not in _known:
            _known[dataset] = _of_table(dataset, names)
        return _known[dataset]
    return None


def _is_read_as(kind: Any, samples: Any) -> bool:
    """Whether samples are what is stored: a list of another class may make or draw them."""
    own = type(samples)
    return (
        isinstance(samples, kind)
        and own.__getitem__ is kind.__getitem__
        and own.__iter__ is kind.__iter__
    )


def _of_samples(samples: list[Any] | tuple[Any, ...]) -> np.ndarray | None:
    try:
        return np.fromiter((_tokens(sample) for sample in samples), np.int64, len(samples))
    except Exception:  # no mapping, no tokens; of any type, as a mapping may read from a disk
        return None


def _tokens(sample: Any) -> int:
    if not isinstance(sample, Mapping):
        raise TypeError("no mapping")
    return max(1, len(sample[_IDS]))


def _of_table(dataset: Any, names: list[str]) -> np.ndarray | None:
    """From a column, read as Arrow: lists give their lengths without being made Python objects."""
    name = next((name for name in (_IDS, _LENGTH) if name in names), None)
    if name is None:
        return None
    parts = []
    for table in dataset.select_columns([name]).with_format("arrow").iter(_TOGETHER):
        for chunk in table.column(0).chunks:
            numbers = chunk.value_lengths() if hasattr(chunk, "value_lengths") else chunk
            if numbers.null_count or not str(numbers.type).startswith(("int", "uint")):
                return None
            parts.append(numbers.to_numpy(zero_copy_only=False).astype(np.int64))
    lengths: np.ndarray = np.concatenate([np.empty(0, np.int64), *parts])
    return lengths.clip(min=1)
