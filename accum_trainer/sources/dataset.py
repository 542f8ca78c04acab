"""A map-style data set as windows: the global order, cut and dealt to the ranks by
`window_plan`."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch import Batch
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import DataError
from accum_trainer.seeds import seed_of
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.sources.drawing import SeededIndices
from accum_trainer.sources.shares import Announced, Reading, WindowShares, read_shares
from accum_trainer.window_plan import Cut, global_order, windows_of

Collate = Callable[[list[Any]], Batch]


class CountedRows:
    """A data set that knows what its batches will hold, so that nothing has to be counted or
    exchanged.

    Attributes:
        lengths: tokens of each sample, shape (samples,), int64.
        num_targets: targets of each sample, shape (samples,), int64.
    """

    lengths: np.ndarray
    num_targets: np.ndarray


class PlannedSource:
    """A map-style data set: the global order from (seed, epoch), windows of B_eff samples, cut and
    dealt by `cut`.

    Args:
        dataset: has `__getitem__` and `__len__`; its attribute `lengths`, if any, is used where
            `lengths` is None.
        lengths: tokens of each sample, shape (len(dataset),); lets the cut avoid padding.
        shuffle: False keeps the data set's own order.
        shard: (i, n), every n-th sample of the order from the i-th; the n shards hold each sample
            exactly once.
        cut: how windows become micro-batches.
        in_thread: parts are asked for in a thread, which must leave the global random generators
            alone.
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
        self._lengths = (
            np.ones(len(dataset), dtype=np.int64) if given is None else np.asarray(given)
        )
        if len(self._lengths) != len(dataset):
            raise DataError(
                f"{len(self._lengths)} lengths are given for a data set of {len(dataset)} samples"
            )
        self._dataset, self._plan, self._rank = dataset, plan, rank
        self._collate_fn, self._seed, self._shuffle = collate_fn, seed, shuffle
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._cut = cut or Cut(plan.micro_batch_size)
        # Known on every rank alike.
        ours = isinstance(dataset, CountedRows) and isinstance(
            collate_fn, (PaddingCollator, PackingCollator)
        )
        self._num_targets = dataset.num_targets if ours else None
        self.knows_counts = ours
        self.reads_ahead = num_workers > 0
        self._draws_here = num_workers == 0 and not in_thread
        self._shard = slice(shard[0], None, shard[1])
        if not range(len(dataset))[self._shard]:
            raise DataError(
                f"shard {shard[0]}/{shard[1]} of {len(dataset)} samples is empty; use at most "
                f"{len(dataset)}"
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
        dealt = (
            self._cut.assign_to_ranks(self._lengths[window], self._plan.world_size)
            if len(window)
            else []
        )
        return [len(own) for own in dealt]

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self._dataset)
        return (global_order(size, self._seed, epoch) if self._shuffle else np.arange(size))[
            self._shard
        ]

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        announced: deque[Announced] = deque()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._micro_batches(epoch, consumed, announced),
            collate_fn=self._collate_fn,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # A generator of its own: the loader draws its workers' seed at each start, and must not
            # draw it from the stream that dropout uses, or a resumed run would differ from one
            # never stopped.
            generator=torch.Generator().manual_seed(self._seed_of("workers", epoch, consumed)),
        )
        reading = Reading(lambda: iter(loader))
        seed = (lambda at: self._seed_of("data", epoch, at)) if self._draws_here else None
        return WindowShares(
            read_shares(reading, announced, consumed, seed), reading if self.reads_ahead else None
        )

    def _seed_of(self, purpose: str, epoch: int, position: int) -> int:
        shard = self._shard.start
        return seed_of(
            purpose, self._seed, epoch=epoch, rank=self._rank, shard=shard, position=position
        )

    def _micro_batches(
        self, epoch: int, consumed: int, announced: deque[Announced]
    ) -> Iterator[list[int]]:
        """Yield this rank's micro-batches as lists of sample indices, announcing each window in
        `announced`.

        A rank with no sample of a window loads one of it as filler: its shortest.
        """
        plan = self._plan
        for window in windows_of(self._order(epoch), plan.global_batch_size, start=consumed):
            lengths = self._lengths[window]
            dealt = self._cut.assign_to_ranks(lengths, plan.world_size)
            mine = dealt[self._rank]
            begin, consumed = consumed, consumed + len(window)
            table = None
            if self._num_targets is not None:
                targets = self._num_targets[window]
                table = np.array(
                    [self._counts(targets, lengths, own) for own in dealt], dtype=float
                )
            announced.append(Announced(len(mine), consumed, zlib.crc32(window.tobytes()), table))
            filler = [[int(window[lengths.argmin()])]]
            batches = [window[micro_batch].tolist() for micro_batch in mine] or filler
            if self._draws_here or self._num_workers:
                # A window has at least as many samples as micro-batches: no position is used twice.
                batches = [
                    SeededIndices(b, self._seed_of("data", epoch, begin + i))
                    for i, b in enumerate(batches)
                ]
            yield from batches

    def _counts(self, targets: np.ndarray, lengths: np.ndarray, own: list[np.ndarray]) -> list[int]:
        """Targets, micro-batches, samples, tokens and positions of one rank's micro-batches."""
        all_own = np.concatenate([np.empty(0, dtype=np.int64), *own])
        positions = sum(self._cut.positions(lengths[micro_batch]) for micro_batch in own)
        return [
            int(targets[all_own].sum()),
            len(own),
            len(all_own),
            int(lengths[all_own].sum()),
            positions,
        ]
