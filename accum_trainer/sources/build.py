"""From what a user passes to a source of windows: a data set, a DataLoader or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import DataError
from accum_trainer.seeds import seed_of
from accum_trainer.sources.dataset import Collate, PlannedSource
from accum_trainer.sources.loader import LoaderSource
from accum_trainer.sources.prefetched import Prefetched
from accum_trainer.sources.progress import Progress
from accum_trainer.sources.shares import Source
from accum_trainer.sources.stream import StreamSource
from accum_trainer.window_plan import Cut


def as_source(
    data: Any,
    plan: BatchPlan,
    rank: int,
    *,
    collate_fn: Collate | None,
    lengths: np.ndarray | None,
    seed: int,
    shuffle: bool,
    num_workers: int,
    pin_memory: bool,
    already_sharded: bool,
    read_together: bool = False,
    shard: tuple[int, int] = (0, 1),
    cut: Cut | None = None,
    prefetch: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Pick the kind of source that `data` is.

    `already_sharded` says that a loader gives this rank's batches only, `read_together` that all
    ranks talk when one is read; `progress` is where a loader keeps its workers.
    """
    if isinstance(data, DataLoader):
        if collate_fn is not None:
            raise DataError(
                "collate_fn is given, but a DataLoader collates by its own; set it there"
            )
        _check_whole(plan)
        if already_sharded:
            return StreamSource(data, plan, early=not read_together)
        _check_batch_size(data, plan)
        if _splits_by_rank(data):
            return StreamSource(
                data, plan, lambda epoch: seed_of("workers", seed, epoch=epoch, rank=rank)
            )
        return LoaderSource(data, plan, rank, seed, progress or Progress())
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        if isinstance(data, (list, tuple)) and collate_fn is None:
            _check_samples(data, plan)
        source = PlannedSource(
            data,
            plan,
            rank,
            collate_fn,
            lengths,
            seed,
            shuffle,
            num_workers,
            pin_memory,
            shard,
            cut,
            prefetch,
        )
        return Prefetched(source) if prefetch else source
    if shard != (0, 1) or cut is not None:
        what = f"shard={shard} is a share" if shard != (0, 1) else "cut decides the micro-batches"
        raise DataError(f"{what} of a map-style data set; {type(data).__name__} is none")
    if isinstance(data, Iterable):
        if collate_fn is not None:
            raise DataError(
                "collate_fn is given, but a stream yields batches, not samples; collate before"
            )
        _check_whole(plan)
        return StreamSource(data, plan)
    raise DataError(
        f"{type(data).__name__} is no source of windows; give a map-style data set, a DataLoader "
        "or an iterable of batches"
    )


def _check_whole(plan: BatchPlan) -> None:
    """Ready batches are the micro-batches; a window that needs a smaller one can be cut from
    samples only."""
    if plan.is_whole:
        return
    step = plan.micro_batch_size * plan.world_size
    below, above = plan.global_batch_size // step * step, plan.gradient_accumulation_steps * step
    raise DataError(
        f"global_batch_size={plan.global_batch_size} is not a multiple of B "
        f"{plan.micro_batch_size} x W {plan.world_size} = "
        f"{step}, and ready batches cannot be cut; use {f'{below} or ' if below else ''}{above}, "
        "or pass the data set itself"
    )


def _check_batch_size(loader: DataLoader, plan: BatchPlan) -> None:
    """The batches of a loader are the micro-batches: with another size an update would not see the
    batch that was named."""
    size, b = loader.batch_size, plan.micro_batch_size
    if size is not None and size != b:
        seen = size * plan.gradient_accumulation_steps * plan.world_size
        raise DataError(
            f"the DataLoader has batch_size={size}, and B is {b}, so that an update would see "
            f"{seen} samples instead of "
            f"{plan.global_batch_size}; give the DataLoader batch_size={b}, or the Accumulator "
            f"micro_batch_size={size}"
        )


def _check_samples(data: Sequence[Any], plan: BatchPlan) -> None:
    """Refuse a list of ready batches, which would be collated into batches of batches.

    Seen by `input_ids` of two dimensions, which no sample has, or by nothing but tensors that all
    have B rows.
    """
    for element in data[:1]:
        b = plan.micro_batch_size
        ids = element.get("input_ids") if isinstance(element, Mapping) else None
        values = element.values() if isinstance(element, Mapping) else element
        tensors = (
            [element]
            if isinstance(element, torch.Tensor)
            else list(values)
            if isinstance(values, Iterable)
            else []
        )
        shapes = [
            tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in tensors
        ]
        has_b_rows = (
            b != 1 and {shape[:1] for shape in shapes} == {(b,)} and max(map(len, shapes)) > 1
        )
        if has_b_rows or (isinstance(ids, torch.Tensor) and ids.ndim > 1):
            raise DataError(
                f"the {type(data).__name__} holds batches, not samples: the first has tensors of "
                "shape "
                f"{', '.join(map(str, shapes))}, and B is {b}. Pass iter(batches) for batches that "
                "are this process's own "
                "already, or a data set of single samples; where these are samples, say so with "
                "collate_fn=torch.utils.data.default_collate"
            )


def _splits_by_rank(loader: DataLoader) -> bool:
    """Whether this loader already gives each rank a share of its own (as DistributedSampler
    does)."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    by_sampler = hasattr(sampler, "num_replicas")
    by_dataset = (
        getattr(loader.dataset, "_distributed", None) is not None
    )  # datasets.distributed.split_dataset_by_node
    return by_sampler or by_dataset
