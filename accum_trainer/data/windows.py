"""A source of data as windows: this rank's micro-batches of each optimizer update.

Three kinds of source, one contract (`Source.parts`):

    PlannedSource   a map-style data set: windows in the global order, cut and dealt by `window_plan`
    LoaderSource    a DataLoader: its batches in its order, dealt to ranks in turn
    StreamSource    batches that are this rank's already

No rank talks to another here. Where all ranks must have read the same thing, a part carries a fingerprint of it, and
the accumulator compares.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.data.batches import Batch as Batch
from accum_trainer.data.batches import first_tensor as first_tensor
from accum_trainer.data.batches import is_packed as is_packed
from accum_trainer.data.batches import num_samples as num_samples
from accum_trainer.data.batches import num_tokens as num_tokens
from accum_trainer.data.collating import PackingCollator, PaddingCollator
from accum_trainer.data.drawing import SeededIndices
from accum_trainer.data.loader import LoaderSource
from accum_trainer.data.parts import Announced, Parts, Reading, Source, read_parts
from accum_trainer.data.parts import Part as Part
from accum_trainer.data.prefetched import Prefetched
from accum_trainer.data.stream import StreamSource
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.epochs import Progress
from accum_trainer.errors import DataError
from accum_trainer.seeds import seed_of
from accum_trainer.window_plan import Cut, global_order, windows_of

Collate = Callable[[list[Any]], Batch]


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

    `already_sharded` says that a loader gives this rank's batches only, `read_together` that all ranks talk when one is read;
    `progress` is where a loader keeps its workers.
    """
    if isinstance(data, DataLoader):
        if collate_fn is not None:
            raise DataError("collate_fn is given, but a DataLoader collates by its own; set it there")
        _check_whole(plan)
        if already_sharded:
            return StreamSource(data, plan, early=not read_together)
        _check_batch_size(data, plan)
        if _splits_by_rank(data):
            return StreamSource(data, plan, lambda epoch: seed_of("workers", seed, epoch=epoch, rank=rank))
        return LoaderSource(data, plan, rank, seed, progress or Progress())
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        if isinstance(data, (list, tuple)) and collate_fn is None:
            _check_samples(data, plan)
        source = PlannedSource(
            data, plan, rank, collate_fn, lengths, seed, shuffle, num_workers, pin_memory, shard, cut, prefetch
        )
        return Prefetched(source) if prefetch else source
    if shard != (0, 1) or cut is not None:
        what = f"shard={shard} is a share" if shard != (0, 1) else "cut decides the micro-batches"
        raise DataError(f"{what} of a map-style data set; {type(data).__name__} is none")
    if isinstance(data, Iterable):
        if collate_fn is not None:
            raise DataError("collate_fn is given, but a stream yields batches, not samples; collate before")
        _check_whole(plan)
        return StreamSource(data, plan)
    raise DataError(
        f"{type(data).__name__} is no source of windows; give a map-style data set, a DataLoader or an iterable of batches"
    )


def _check_whole(plan: BatchPlan) -> None:
    """Ready batches are the micro-batches; a window that needs a smaller one can be cut from samples only."""
    if plan.is_whole:
        return
    step = plan.micro_batch_size * plan.world_size
    below, above = plan.global_batch_size // step * step, plan.gradient_accumulation_steps * step
    raise DataError(
        f"global_batch_size={plan.global_batch_size} is not a multiple of B {plan.micro_batch_size} x W {plan.world_size} = "
        f"{step}, and ready batches cannot be cut; use {f'{below} or ' if below else ''}{above}, or pass the data set itself"
    )


def _check_batch_size(loader: DataLoader, plan: BatchPlan) -> None:
    """The batches of a loader are the micro-batches: with another size an update would not see the batch that was named."""
    size, b = loader.batch_size, plan.micro_batch_size
    if size is not None and size != b:
        seen = size * plan.gradient_accumulation_steps * plan.world_size
        raise DataError(
            f"the DataLoader has batch_size={size}, and B is {b}, so that an update would see {seen} samples instead of "
            f"{plan.global_batch_size}; give the DataLoader batch_size={b}, or the Accumulator micro_batch_size={size}"
        )


def _check_samples(data: Sequence[Any], plan: BatchPlan) -> None:
    """Refuse a list of ready batches, which would be collated into batches of batches.

    Seen by `input_ids` of two dimensions, which no sample has, or by nothing but tensors that all have B rows.
    """
    for element in data[:1]:
        b = plan.micro_batch_size
        ids = element.get("input_ids") if isinstance(element, Mapping) else None
        values = element.values() if isinstance(element, Mapping) else element
        tensors = (
            [element] if isinstance(element, torch.Tensor) else list(values) if isinstance(values, Iterable) else []
        )
        shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in tensors]
        has_b_rows = b != 1 and {shape[:1] for shape in shapes} == {(b,)} and max(map(len, shapes)) > 1
        if has_b_rows or (isinstance(ids, torch.Tensor) and ids.ndim > 1):
            raise DataError(
                f"the {type(data).__name__} holds batches, not samples: the first has tensors of shape "
                f"{', '.join(map(str, shapes))}, and B is {b}. Pass iter(batches) for batches that are this process's own "
                "already, or a data set of single samples; where these are samples, say so with "
                "collate_fn=torch.utils.data.default_collate"
            )


def _splits_by_rank(loader: DataLoader) -> bool:
    """Whether this loader already gives each rank a share of its own (as DistributedSampler does)."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    by_sampler = hasattr(sampler, "num_replicas")
    by_dataset = getattr(loader.dataset, "_distributed", None) is not None  # datasets.distributed.split_dataset_by_node
    return by_sampler or by_dataset


class PlannedSource:
    """A map-style data set: the global order from (seed, epoch), windows of B_eff samples, cut and dealt by `cut`.

    Args:
        dataset: has `__getitem__` and `__len__`; its attribute `lengths`, if any, is used where `lengths` is None.
        lengths: tokens of each sample, shape (len(dataset),); lets the cut avoid padding.
        shuffle: False keeps the data set's own order.
        shard: (i, n), every n-th sample of the order from the i-th; the n shards hold each sample exactly once.
        cut: how windows become micro-batches.
        in_thread: parts are asked for in a thread, which must leave the global random generators alone.
    """

    unit = "samples"
    alike = True
    is_read_once = False

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        rank: int,
        collate_fn: Collate | None,
        lengths: np.ndarray | None,
        seed: int,
        shuffle: bool,
        num_workers: int,
        pin_memory: bool,
        shard: tuple[int, int] = (0, 1),
        cut: Cut | None = None,
        in_thread: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("the data set is empty; there is no window to train on")
        given = lengths if lengths is not None else getattr(dataset, "lengths", None)
        self._lengths = np.ones(len(dataset), dtype=np.int64) if given is None else np.asarray(given)
        if len(self._lengths) != len(dataset):
            raise DataError(f"{len(self._lengths)} lengths are given for a data set of {len(dataset)} samples")
        self._dataset, self._plan, self._rank = dataset, plan, rank
        self._collate_fn, self._seed, self._shuffle = collate_fn, seed, shuffle
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._cut = cut or Cut(plan.micro_batch_size)
        # Tokenised rows know what their batches will hold, on every rank alike: nothing has to be counted or asked.
        ours = isinstance(dataset, TokenizedRows) and isinstance(collate_fn, (PaddingCollator, PackingCollator))
        self._num_targets = dataset.num_targets if ours else None
        self.knows_counts = ours
        self.reads_ahead = num_workers > 0
        self._draws_here = num_workers == 0 and not in_thread
        self._shard = slice(shard[0], None, shard[1])
        if not range(len(dataset))[self._shard]:
            raise DataError(
                f"shard {shard[0]}/{shard[1]} of {len(dataset)} samples is empty; use at most {len(dataset)}"
            )

    def num_windows(self) -> int:
        return -(-len(range(len(self._dataset))[self._shard]) // self._plan.global_batch_size)

    def order(self) -> None:
        """(seed, epoch) says it all."""

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        plan = self._plan
        if self._cut.max_tokens is not None or self._cut.rank_weights is not None:
            return None
        if not (plan.is_whole or plan.world_size == 1 or self._cut.equal_counts):
            return None  # which rank runs one more, the lengths decide
        order = self._order(epoch)
        whole, rest = divmod(len(order), plan.global_batch_size)
        first, last = order[: plan.global_batch_size if whole else 0], order[len(order) - rest :]
        return whole, self._counts_of(first), self._counts_of(last)

    def _counts_of(self, window: np.ndarray) -> list[int]:
        """How many micro-batches each rank runs of a window; [] of none."""
        dealt = self._cut.deal(self._lengths[window], self._plan.world_size) if len(window) else []
        return [len(own) for own in dealt]

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self._dataset)
        return (global_order(size, self._seed, epoch) if self._shuffle else np.arange(size))[self._shard]

    def parts(self, epoch: int, consumed: int) -> Parts:
        announced: deque[Announced] = deque()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._micro_batches(epoch, consumed, announced),
            collate_fn=self._collate_fn,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # A generator of its own: the loader draws its workers' seed at each start, and must not draw it from the
            # stream that dropout uses, or a resumed run would differ from one never stopped.
            generator=torch.Generator().manual_seed(self._seed_of("workers", epoch, consumed)),
        )
        reading = Reading(lambda: iter(loader))
        seed = (lambda at: self._seed_of("data", epoch, at)) if self._draws_here else None
        return Parts(read_parts(reading, announced, consumed, seed), reading if self.reads_ahead else None)

    def _seed_of(self, purpose: str, epoch: int, position: int) -> int:
        shard = self._shard.start
        return seed_of(purpose, self._seed, epoch=epoch, rank=self._rank, shard=shard, position=position)

    def _micro_batches(self, epoch: int, consumed: int, announced: deque[Announced]) -> Iterator[list[int]]:
        """Yield this rank's micro-batches as lists of sample indices, announcing each window in `announced`.

        A rank with no sample of a window loads one of it as filler: its shortest.
        """
        plan = self._plan
        for window in windows_of(self._order(epoch), plan.global_batch_size, start=consumed):
            lengths = self._lengths[window]
            dealt = self._cut.deal(lengths, plan.world_size)
            mine = dealt[self._rank]
            begin, consumed = consumed, consumed + len(window)
            table = None
            if self._num_targets is not None:
                targets = self._num_targets[window]
                table = np.array([self._counts(targets, lengths, own) for own in dealt], dtype=float)
            announced.append(Announced(len(mine), consumed, zlib.crc32(window.tobytes()), table))
            filler = [[int(window[lengths.argmin()])]]
            batches = [window[micro_batch].tolist() for micro_batch in mine] or filler
            if self._draws_here or self._num_workers:
                # A window has at least as many samples as micro-batches: no position is used twice.
                batches = [SeededIndices(b, self._seed_of("data", epoch, begin + i)) for i, b in enumerate(batches)]
            yield from batches

    def _counts(self, targets: np.ndarray, lengths: np.ndarray, own: list[np.ndarray]) -> list[int]:
        """Targets, micro-batches, samples, tokens and positions of one rank's micro-batches."""
        all_own = np.concatenate([np.empty(0, dtype=np.int64), *own])
        positions = sum(self._cut.positions(lengths[micro_batch]) for micro_batch in own)
        return [int(targets[all_own].sum()), len(own), len(all_own), int(lengths[all_own].sum()), positions]
