"""Refuse packed rows on a model that is not proven to keep packed samples apart.

All ranks prove it together on the first packed micro-batch. A hook on each model of the loop then
accepts packed rows like that one and refuses others in their forward, before they spoil an update.
On a proven model the hook never waits for the device. Knows the engine's ranks, but no window.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from accum_trainer.batch import BOUNDARIES, Batch, is_packed, num_positions, num_samples
from accum_trainer.errors import DataError
from accum_trainer.losses.dry_run import inside_wrapper
from accum_trainer.losses.packing import find_packing, uses_cache, worst_of
from accum_trainer.losses.packing_proof import Packing

# Fewest tokens in the row of a proof: it exercises attention windows up to this size, even if the
# first real row is short.
_MOST = 4352
_PADDED = "give it padded batches with an attention_mask"


class PackingGuard:
    """Knows the models of a loop and which of them may run packed rows.

    Args:
        engine: of the accumulator.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._found: weakref.WeakKeyDictionary[torch.nn.Module, Packing] = (
            weakref.WeakKeyDictionary()
        )
        self._is_proving = False
        self._watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def decide(self, models: Sequence[torch.nn.Module], batches: Sequence[Batch]) -> None:
        """Prove the models on the first packed row of any rank, if there is one. Collective.

        Args:
            models: as the loop calls them.
            batches: this rank's micro-batches; may be none.

        Raises:
            DataError: a batch is packed in a way that no proof covers.
        """
        for model in models:
            if model not in self._watched:
                self._watched.add(model)
                model.register_forward_pre_hook(self._check, with_kwargs=True)
        if len(self._found) == len(models):
            return
        problem = self._engine.first_of(next(filter(None, map(_packed_otherwise, batches)), None))
        if problem is not None:
            raise DataError(problem)
        rows = [batch for batch in batches if isinstance(batch, Mapping) and is_packed(batch)]
        row = self._engine.first_of(max(rows, key=num_positions, default=None))
        if row is None:
            return
        self._is_proving = True
        try:
            for model in models:
                self._found[model] = self._prove(model, row)
        finally:
            self._is_proving = False

    def _prove(self, model: torch.nn.Module, row: Mapping[str, Any]) -> Packing:
        engine = self._engine
        wrong = _wrong_boundary(row)
        if wrong:
            return Packing(False, f"its {wrong} does not fit its position_ids", _boundaries_in(row))
        return find_packing(
            engine.unwrap(model),
            row["input_ids"].to(engine.device),
            most=max(_MOST, row["input_ids"].numel()),
            boundaries=_boundaries_in(row),
            is_16_bit=engine.mixed_precision != "no",
            backward=engine.runs_alone,
            agree=lambda found: worst_of(engine.gather_objects(found)),
        )

    def _check(self, model: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if self._is_proving or not is_packed(inputs):
            return
        found = self._found.get(model)
        problem = _problem(model, inputs, found)
        # Only now read values, which waits for the device. A single sample sees no other.
        if problem and num_samples(inputs) > 1:
            name = type(inside_wrapper(model)).__name__.removeprefix("FSDP")
            raise DataError(f"a packed batch of {num_samples(inputs)} samples on {name}: {problem}")


def _boundaries_in(batch: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in BOUNDARIES if name in batch)


def _wrong_boundary(row: Mapping[str, Any]) -> str:
    """The first of a row's boundaries that contradicts its position_ids; "" if none does."""
    begins = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    edges = sorted({0, *begins, row["position_ids"].shape[1]})
    longest = max(end - begin for begin, end in pairwise(edges))
    for name in _boundaries_in(row):
        if name.startswith("cu_seq_lens"):
            fits = row[name].tolist() == edges
        elif name.startswith("max_length"):
            fits = int(row[name]) >= longest
        else:  # from any first number
            fits = (row[name][0].diff().nonzero().flatten() + 1).tolist() == edges[1:-1]
        if not fits:
            return name
    return ""


def _packed_otherwise(batch: Batch) -> str | None:
    """Why this batch is refused, or None: it is packed, but not in a single row without a mask."""
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or is_packed(batch):
        return None
    mask = batch.get("attention_mask")
    restarts = positions[:, 1:] == 0
    if isinstance(mask, torch.Tensor):
        if mask.shape != positions.shape:
            return None  # a mask of another shape says more than which tokens are padding
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if not restarts.any():
        return None
    return (
        f"a batch has position_ids of shape {tuple(positions.shape)} that restart inside a row"
        f"{' next to an attention_mask' if mask is not None else ''}: only in a single row without "
        "a mask does transformers keep packed samples apart on every kind of attention; lay them "
        "in one row (PackingCollator does), or pad them"
    )


def _problem(model: torch.nn.Module, inputs: Mapping[str, Any], found: Packing | None) -> str:
    """Why this model may not run this packed row, and the remedy; "" if it may."""
    if found is None:
        return (
            "no micro-batch of the first window was packed, so it is not proven that the samples "
            f"do not see each other; put a packed one into the first window, or {_PADDED}"
        )
    if not found.holds:
        remedy = f"; {_PADDED}"
        if found.remedy:
            remedy = f"; collate with PackingCollator(boundaries={found.remedy!r}), or {_PADDED}"
        return f"its samples see each other: {found.reason}{remedy}"
    if (
        found.without_cache
        and inputs.get("use_cache") is not False
        and uses_cache(inside_wrapper(model))
    ):
        return (
            "its samples see each other: with a cache, transformers ignores positions that "
            "restart; set model.config.use_cache = False before training, or use causal_lm_loss"
        )
    given = _boundaries_in(inputs)
    if given != found.boundaries:
        return (
            f"it holds the boundaries {given}, but {found.boundaries} are proven; collate all "
            "batches of a loop alike"
        )
    return ""
