"""Batches that show what a loss sums over: a real one, its halves, and the same by hidden labels.

    whole          the batch, with unequal numbers of targets in its halves
    halves         its samples in two
    hidden         `whole` with the labels of one half hidden, and of the other
    first_column   the first label of each row alone, which a loss that shifts does not count
    wider          `whole` with more padding

Knows how batches of transformers look; runs nothing and judges nothing (`objective` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.data.halving import halve
from accum_trainer.data.tokenizing import IGNORE
from accum_trainer.data.windows import Batch, is_packed, num_samples
from accum_trainer.errors import DataError

_FEWEST_TARGETS = 6  # of a batch whose labels are hidden in parts
_MORE_PADDING = 3  # columns, to see whether they change the loss


@dataclass(frozen=True)
class Probe:
    """Batches to run.

    Attributes:
        whole: the batch, with unequal halves.
        halves: its samples in two; None if it cannot be cut.
        hidden: `whole` with all labels but those of one half hidden, twice; None if none can be.
        first_column: `whole` with the first label of each row alone, which a shift drops.
        wider: `whole` with more columns of padding.
    """

    whole: Batch
    halves: tuple[Batch, Batch] | None = None
    hidden: tuple[Batch, Batch] | None = None
    first_column: Batch | None = None
    wider: Batch | None = None

    def batches(self) -> Iterator[tuple[str, Batch]]:
        yield "whole", self.whole
        for name in ("halves", "hidden"):
            for index, batch in enumerate(getattr(self, name) or ()):
                yield f"{name}{index}", batch
        for name in ("first_column", "wider"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def probe_of(model: Any, batch: Batch, ignore: int) -> Probe:
    """Raises DataError if there is nothing to cut and nothing to hide."""
    is_row = isinstance(batch, Mapping) and is_packed(batch)
    if not is_row and num_samples(batch) == 1:
        batch = _twice(batch)
    if not isinstance(batch, Mapping):
        return Probe(batch, halve(batch))
    labels = batch.get("labels")
    if _can_hide(model, labels, ignore):
        labels = _filled_up(batch, ignore)
        batch = _with_decoder_inputs(model, {**batch, "labels": labels})
        first = _first_half(labels, ignore)
        thinned = _thinned(labels, first, ignore)
        whole = {**batch, "labels": thinned}
        hidden = (
            {**whole, "labels": thinned.masked_fill(~first, ignore)},
            {**whole, "labels": thinned.masked_fill(first, ignore)},
        )
        only_first = torch.full_like(labels, ignore)
        some_label = labels[labels != ignore][0]
        column = labels[..., 0]
        only_first[..., 0] = torch.where(column == ignore, some_label, column)
        alone = {**batch, "labels": only_first}
        return Probe(whole, _halves_or_none(whole), hidden, alone, _wider(model, whole, ignore))
    return Probe(batch, halve(batch), wider=_wider(model, batch, ignore))


def _can_hide(model: Any, labels: Any, ignore: int) -> bool:
    """Whether `ignore` is sure to mean "no target": on a GPU a wrong label ends the process."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return False
    if labels.shape[-1] < 2:
        return False
    return hasattr(model, "loss_function") or bool((labels == ignore).any())


def _filled_up(batch: Mapping[str, Any], ignore: int) -> torch.Tensor:
    """The labels; if hardly any is a target, with class 0, which every loss knows, in the gaps."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    if int((labels != ignore).sum()) >= _FEWEST_TARGETS:
        return labels
    filled = labels.masked_fill(labels == ignore, 0)
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        return filled.masked_fill(mask == 0, ignore)
    return filled


def _wider(model: Any, batch: Mapping[str, Any], ignore: int) -> Batch | None:
    """The batch with more padding on the right; None if it has no mask that would hide it."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    if ids.ndim != 2 or mask.shape != ids.shape or "position_ids" in batch:
        return None
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None)
    fillings = {"input_ids": pad_token if isinstance(pad_token, int) else 0, "labels": ignore}

    def widened(key: str, value: Any) -> Any:
        along = isinstance(value, torch.Tensor) and value.shape == ids.shape
        of_decoder = key.startswith("decoder_") or (key == "labels" and "decoder_input_ids" in batch)
        if not along or of_decoder:
            return value
        return torch.nn.functional.pad(value, (0, _MORE_PADDING), value=fillings.get(key, 0))

    return {key: widened(key, value) for key, value in batch.items()}


def _first_half(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """True on the first rows, up to half of the targets; inside a row if only one has any."""
    first = torch.zeros_like(labels, dtype=torch.bool)
    is_target = labels != ignore
    by_row = is_target.flatten(1).sum(1).cumsum(0)
    rows = int((by_row <= by_row[-1] // 2).sum())
    if 0 < rows < len(labels) and by_row[rows - 1] > 0:
        first[:rows] = True
        return first
    targets = is_target.flatten().nonzero().flatten()
    first.view(-1)[: int(targets[len(targets) // 2])] = True
    return first


def _thinned(labels: torch.Tensor, first: torch.Tensor, ignore: int) -> torch.Tensor:
    """The labels with two of three targets of the first half hidden: the halves are unequal."""
    flat = labels.flatten().clone()
    targets = ((flat != ignore) & first.flatten()).nonzero().flatten()
    kept = targets[2::3] if len(targets) > 2 else targets
    hidden = torch.ones_like(targets, dtype=torch.bool)
    hidden[torch.isin(targets, kept)] = False
    flat[targets[hidden]] = ignore
    return flat.view_as(labels)


def _halves_or_none(batch: Batch) -> tuple[Batch, Batch] | None:
    try:
        return halve(batch)
    except DataError:
        return None


def _twice(batch: Batch) -> Batch:
    """A batch of one sample as a batch of two, both the same."""

    def twice(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.cat([value, value]) if value.ndim else value
        if isinstance(value, Mapping):
            return {key: twice(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return value * 2
        if isinstance(value, tuple):
            return tuple(twice(entry) for entry in value)
        raise DataError(f"a batch of one sample holds a {type(value).__name__}, which has no half")

    return twice(batch)


def _with_decoder_inputs(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Encoder-decoders make their decoder's input from the labels: hiding some must not change it."""
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return batch
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = batch["labels"]
    if shift is not None:
        return {**batch, "decoder_input_ids": shift(labels)}
    start = torch.full_like(labels[:, :1], int(getattr(config, "decoder_start_token_id", 0) or 0))
    pad = int(getattr(config, "pad_token_id", 0) or 0)
    return {**batch, "decoder_input_ids": torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, pad)], 1)}


def ignored_label(model: Any) -> int:
    found = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
    return found if isinstance(found, int) and _segments(model) else IGNORE


def _segments(model: Any) -> bool:
    return "SemanticSegmentation" in str(getattr(model, "loss_type", "")) + type(model).__name__
