"""Batches that show what a loss sums over: a real one, its halves, the same with hidden labels.

    whole          the batch, with unequal numbers of targets in its halves
    halves         its samples in two parts
    hidden         `whole` with the labels of one half hidden, then of the other
    first_column   only the first label of each row, which a loss that shifts does not count
    wider          `whole` with more padding

Knows the keys of transformers' batches. Runs nothing (`trial` does) and judges nothing
(`objective` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.batch import IGNORE, Batch, halve, is_packed, num_samples
from accum_trainer.errors import DataError

_FEWEST_TARGETS = 6  # in a batch whose labels are hidden in parts
_MORE_PADDING = 3  # columns of `wider`


@dataclass(frozen=True)
class Probe:
    """Batches to run.

    Attributes:
        whole: the batch, with unequal halves.
        halves: its samples in two parts; None if it cannot be split.
        hidden: `whole` with only the labels of the first half, and of the second; None if no label
            can be hidden.
        first_column: `whole` with only the first label of each row, which a shift drops; None if
            rows have one label or labels cannot be hidden.
        wider: `whole` with more columns of padding; None if its length is not known.
        is_row: the samples lie end to end in one row.
    """

    whole: Batch
    halves: tuple[Batch, Batch] | None = None
    hidden: tuple[Batch, Batch] | None = None
    first_column: Batch | None = None
    wider: Batch | None = None
    is_row: bool = False

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """(name, batch) of each run, in order."""
        yield "whole", self.whole
        for name in ("halves", "hidden"):
            for index, batch in enumerate(getattr(self, name) or ()):
                yield f"{name}{index}", batch
        yield "noisy", self.whole  # halves and hidden ones are compared with it
        for name in ("first_column", "wider"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def probe_of(model: Any, batch: Batch, ignore: int) -> Probe:
    """Build the probe of a batch.

    Args:
        model: as one process calls it.
        batch: a real micro-batch, with labels.
        ignore: the label that marks no target.

    Raises:
        DataError: the batch can neither be split nor have labels hidden.
    """
    is_row = isinstance(batch, Mapping) and is_packed(batch)
    if not is_row and num_samples(batch) == 1:
        batch = _twice(batch, ignore)
    if not isinstance(batch, Mapping):
        return Probe(batch, halve(batch))
    labels = batch.get("labels")
    if not _can_hide(model, labels, ignore):
        if isinstance(labels, torch.Tensor) and labels.ndim == 1 and _is_whole(labels):
            batch = {**batch, "labels": _varied(labels, ignore)}
        return Probe(batch, halve(batch), wider=_wider(model, batch, ignore), is_row=is_row)
    labels = _varied(_filled_up(batch, ignore), ignore)
    if not is_padded_left(batch.get("attention_mask")):
        labels = _with_first(labels, ignore)
    batch = _with_decoder_inputs(model, {**batch, "labels": labels})
    first = _first_half(labels, ignore)
    thinned = _thinned(labels, first, ignore)
    whole = {**batch, "labels": thinned}
    hidden = (
        {**whole, "labels": thinned.masked_fill(~first, ignore)},
        {**whole, "labels": thinned.masked_fill(first, ignore)},
    )
    alone = None
    if labels.ndim > 1 and labels.shape[-1] > 1:
        only_first = torch.full_like(labels, ignore)
        column, real = labels[..., 0], labels[labels != ignore]
        some_label = real[0] if len(real) else torch.zeros_like(column).flatten()[0]
        only_first[..., 0] = torch.where(column == ignore, some_label, column)
        alone = {**batch, "labels": only_first}
    return Probe(whole, _halves_or_none(whole), hidden, alone, _wider(model, whole, ignore), is_row)


def _can_hide(model: Any, labels: Any, ignore: int) -> bool:
    """Whether `ignore` surely means "no target": on a GPU a wrong label ends the process."""
    if not isinstance(labels, torch.Tensor) or not _is_whole(labels) or labels.numel() < 2:
        return False
    return hasattr(model, "loss_function") or bool((labels == ignore).any())


def _is_whole(labels: torch.Tensor) -> bool:
    return not labels.is_floating_point() and labels.dtype != torch.bool


def _filled_up(batch: Mapping[str, Any], ignore: int) -> torch.Tensor:
    """The labels; with few targets, the gaps are filled with class 0, which every loss knows."""
    labels: torch.Tensor = batch["labels"]
    mask = batch.get("attention_mask")
    if int((labels != ignore).sum()) >= _FEWEST_TARGETS:
        return labels
    filled = labels.masked_fill(labels == ignore, 0)
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape and bool(mask.any()):
        return filled.masked_fill(mask == 0, ignore)
    return filled


def is_padded_left(mask: Any) -> bool:
    """Whether a mask of shape (samples, tokens) hides the start of rows and not their end."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return False
    return bool(mask[:, -1].all()) and not bool(mask[:, 0].all())


def _with_first(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """The labels, with the very first as a target: counts with and without a shift then differ."""
    real = labels[labels != ignore]
    if labels.ndim < 2 or labels.shape[-1] < 2 or len(real) == 0:
        return labels
    filled = labels.flatten().clone()
    filled[0] = torch.where(filled[0] == ignore, real[0], filled[0])
    return filled.view_as(labels)


def _varied(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """The labels, not all of one class: otherwise a weight per class would cancel out."""
    real = labels[labels != ignore]
    if len(real) < 2 or bool((real != real[0]).any()):
        return labels
    varied = labels.flatten().clone()
    last = (varied != ignore).nonzero().flatten()[-1]
    varied[last] = 0 if int(real[0]) != 0 else 1
    return varied.view_as(labels)


# The keys that tell how long a batch's samples are, and the padding value of each.
_LENGTHS = {"input_ids": 0, "inputs_embeds": 0, "input_values": 0.0, "input_features": 0.0}


def length_of(batch: Batch) -> tuple[str, tuple[int, ...]] | None:
    """A batch's padded length: a key and its shape without the samples; None if unknown."""
    if not isinstance(batch, Mapping):
        return None
    for key in _LENGTHS:
        value = batch.get(key)
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return key, tuple(value.shape[1:])
    return None


def _wider(model: Any, batch: Mapping[str, Any], ignore: int) -> Batch | None:
    """The batch with more padding, on the side that has some; None if its length is not known."""
    found = length_of(batch)
    if found is None or "position_ids" in batch:
        return None
    key, mask = found[0], batch.get("attention_mask")
    values = batch[key]
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    along = (
        1
        if values.ndim == 2
        or key != "input_features"
        or (mask is not None and mask.shape[1] == values.shape[1])
        else -1
    )
    length = values.shape[along]
    # A model makes one frame from several positions of a sound.
    is_text = key in ("input_ids", "inputs_embeds")
    more = _MORE_PADDING if is_text else max(_MORE_PADDING, length // 4)
    on_left = is_padded_left(mask)
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None)
    fillings = {**_LENGTHS, "labels": ignore}
    if isinstance(pad_token, int):
        fillings["input_ids"] = pad_token

    def widened(name: str, value: Any) -> Any:
        of_decoder = name.startswith("decoder_") or (
            name == "labels" and "decoder_input_ids" in batch
        )
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or of_decoder:
            return value
        if value.shape[0] != values.shape[0] or value.shape[along] != length:
            return value
        behind = 2 * (value.ndim - 2) if along == 1 else 0
        edges = (more, 0) if on_left else (0, more)
        return torch.nn.functional.pad(value, (0,) * behind + edges, value=fillings.get(name, 0))

    return {name: widened(name, value) for name, value in batch.items()}


def _first_half(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """True on the first rows, up to half of the targets; splits a row if only one has targets.

    Rows count as a shift leaves them, without their first label.
    """
    first = torch.zeros_like(labels, dtype=torch.bool)
    is_target = labels != ignore
    shifted = is_target[..., 1:] if labels.ndim > 1 else is_target
    by_row = shifted.reshape(len(labels), -1).sum(1).cumsum(0)
    rows = int((by_row <= by_row[-1] // 2).sum())
    if 0 < rows < len(labels) and by_row[rows - 1] > 0:
        first[:rows] = True
        return first
    targets = is_target.flatten().nonzero().flatten()
    first.view(-1)[: int(targets[len(targets) // 2])] = True
    return first


def _thinned(labels: torch.Tensor, first: torch.Tensor, ignore: int) -> torch.Tensor:
    """The labels with two of three targets of the first half hidden, so that halves are unequal.

    A shift drops the first label of a row, so one of another place stays, too.
    """
    flat = labels.flatten().clone()
    targets = ((flat != ignore) & first.flatten()).nonzero().flatten()
    kept = targets[0::3] if len(targets) > 2 else targets  # including the very first label
    if labels.ndim > 1:
        later = targets[targets % labels.shape[-1] > 0]
        if len(later) and not bool(torch.isin(later, kept).any()):
            kept = torch.cat([kept, later[:1]])
    hidden = torch.ones_like(targets, dtype=torch.bool)
    hidden[torch.isin(targets, kept)] = False
    flat[targets[hidden]] = ignore
    return flat.view_as(labels)


def _halves_or_none(batch: Batch) -> tuple[Batch, Batch] | None:
    try:
        return halve(batch)
    except DataError:
        return None


def _twice(batch: Batch, ignore: int) -> Batch:
    """A batch of one sample as a batch of two; a single label gets another class in the second.

    With equal samples, any weight per sample would cancel out.
    """

    def twice(value: Any, name: str = "") -> Any:
        if isinstance(value, torch.Tensor):
            if value.ndim == 0:
                return value
            sample = 0 if value.shape[0] == 1 else 1
            if value.ndim <= sample or value.shape[sample] != 1:
                return value
            second = value.clone()
            if "label" in name and value.numel() == 1 and _is_whole(value):
                second[...] = 0 if int(value) != 0 else 1
            elif name == "labels" and _is_whole(value) and int(value.max()) > 0:
                # Some losses take class 0 for padding and count more in the second.
                second[second == 0] = value.max()
            return torch.cat([value, second], sample)
        if isinstance(value, Mapping):
            return {key: twice(entry, str(key)) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            holds_tensors = any(isinstance(entry, torch.Tensor) for entry in value)
            return type(value)(map(twice, value)) if holds_tensors else value * 2
        return value

    return twice(batch)


def _with_decoder_inputs(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with the decoder's input, which hidden labels would change otherwise."""
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
    return {
        **batch,
        "decoder_input_ids": torch.cat(
            [start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, pad)], 1
        ),
    }


def ignored_label(model: Any) -> int:
    """The label that marks no target for this model's own loss; -100 unless it names another."""
    found = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
    return found if isinstance(found, int) and _segments(model) else IGNORE


def _segments(model: Any) -> bool:
    return "SemanticSegmentation" in str(getattr(model, "loss_type", "")) + type(model).__name__
