"""Choose the source of windows for a data set, a DataLoader or a stream.

Refuses data that cannot make the windows that were asked for. Knows the kinds of sources, but
reads none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import ConfigError, DataError
from accum_trainer.seeds import seed_of
from accum_trainer.sources.dataset import PlannedSource
from accum_trainer.sources.loader import LoaderSource
from accum_trainer.sources.options import SourceOptions
from accum_trainer.sources.prefetched import Prefetched
from accum_trainer.sources.progress import Progress
from accum_trainer.sources.shares import Source
from accum_trainer.sources.stream import StreamSource


def as_source(
    data: Any,
    plan: BatchPlan,
    rank: int,
    options: SourceOptions,
    progress: Progress | None = None,
) -> Source:
    """The source of windows for `data`.

    Args:
        data: a map-style data set, a DataLoader, or an iterable of this rank's batches.
        plan: B, K, W and the global batch size.
        rank: of this process.
        options: how to read it.
        progress: the position in `data`, which also keeps a loader's workers alive.

    Raises:
        ConfigError: `noise_every` is no number of windows.
        DataError: `data` is no source of windows, or does not fit the plan or the options.
    """
    progress = progress or Progress()
    if options.noise_every:
        _check_random(data, plan, options)
    if isinstance(data, DataLoader):
        return _loader_source(data, plan, rank, options, progress)
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        if isinstance(data, (list, tuple)) and options.collate_fn is None:
            _check_samples(data, plan)
        source = PlannedSource(data, plan, rank, options, progress)
        return Prefetched(source) if options.prefetch else source
    shard = options.shard
    if shard != (0, 1) or options.cut is not None:
        what = f"shard={shard} is a share" if shard != (0, 1) else "cut decides the micro-batches"
        raise DataError(f"{what} of a map-style data set; {type(data).__name__} is none")
    if isinstance(data, Iterable):
        if options.collate_fn is not None:
            raise DataError(
                "collate_fn is given, but a stream yields batches, not samples; collate before"
            )
        _check_whole(plan)
        return StreamSource(data, plan)
    raise DataError(
        f"{type(data).__name__} is no source of windows; give a map-style data set, a DataLoader "
        "or an iterable of batches"
    )


def _loader_source(
    loader: DataLoader[Any], plan: BatchPlan, rank: int, options: SourceOptions, progress: Progress
) -> Source:
    if options.collate_fn is not None:
        raise DataError(
            "collate_fn is given, but a DataLoader has its own; pass it to the DataLoader"
        )
    _check_whole(plan)
    if options.already_sharded:
        return StreamSource(loader, plan, early=not options.read_together)
    _check_batch_size(loader, plan)
    if _splits_by_rank(loader):
        seed = options.seed
        return StreamSource(
            loader, plan, lambda epoch: seed_of("workers", seed, epoch=epoch, rank=rank)
        )
    return LoaderSource(loader, plan, rank, options.seed, progress, options.noise_every)


def _check_random(data: Any, plan: BatchPlan, options: SourceOptions) -> None:
    """Refuse a source whose micro-batches may be no random samples of the data."""
    every = options.noise_every
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ConfigError(
            f"noise_every={options.noise_every} is not a number of windows; give 1 or more, or 0 "
            "to measure no noise"
        )
    reason = ""
    if isinstance(data, DataLoader):
        is_plain = type(data.batch_sampler) is BatchSampler and not options.already_sharded
        if not is_plain or type(data.sampler) is not RandomSampler:
            reason = "this DataLoader does not draw its batches at random as shuffle=True does"
        elif plan.gradient_accumulation_steps == 1:
            reason = "the batches of a DataLoader cannot be cut, and K is 1"
    elif not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
        reason = "the order of a stream is not known"
    elif not options.shuffle:
        reason = "shuffle=False keeps the data set's own order"
    if reason:
        raise DataError(
            f"noise_every={options.noise_every} measures the noise of the gradient on "
            f"micro-batches that are random samples, and {reason}; pass a data set, shuffled, or "
            "leave noise_every out"
        )


def _check_whole(plan: BatchPlan) -> None:
    """Refuse a global batch that ready batches cannot make, since only samples can be split."""
    if plan.is_whole:
        return
    step = plan.micro_batch_size * plan.world_size
    below, above = plan.global_batch_size // step * step, plan.gradient_accumulation_steps * step
    raise DataError(
        f"global_batch_size={plan.global_batch_size} is not a multiple of B "
        f"{plan.micro_batch_size} x W {plan.world_size} = {step}, and ready batches cannot be "
        f"split; use {f'{below} or ' if below else ''}{above}, or pass the data set itself"
    )


def _check_batch_size(loader: DataLoader[Any], plan: BatchPlan) -> None:
    """Refuse a loader whose batches are not micro-batches of B samples."""
    size, b = loader.batch_size, plan.micro_batch_size
    if size is not None and size != b:
        seen = size * plan.gradient_accumulation_steps * plan.world_size
        raise DataError(
            f"the DataLoader has batch_size={size}, and B is {b}, so that an update would see "
            f"{seen} samples instead of {plan.global_batch_size}; give the DataLoader "
            f"batch_size={b}, or the Accumulator micro_batch_size={size}"
        )


def _check_samples(data: Sequence[Any], plan: BatchPlan) -> None:
    """Refuse a list of ready batches, which would be collated into batches of batches.

    The first element is a batch if its `input_ids` have two dimensions, or if it holds nothing but
    tensors that all have B rows.
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
                f"shape {', '.join(map(str, shapes))}, and B is {b}. Pass iter(batches) if the "
                "batches are this process's own, or a data set of single samples; if these are "
                "samples, say so with collate_fn=torch.utils.data.default_collate"
            )


def _splits_by_rank(loader: DataLoader[Any]) -> bool:
    """Whether this loader gives each rank its own share, as DistributedSampler does."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # `datasets.distributed.split_dataset_by_node` sets `_distributed`.
    return (
        hasattr(sampler, "num_replicas")
        or getattr(loader.dataset, "_distributed", None) is not None
    )
