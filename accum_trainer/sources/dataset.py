"""A map-style data set as windows: the global order, split over ranks by `window_plan`.

Knows no model and no other rank: each rank computes the plan of all from the same numbers.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import DataError
from accum_trainer.exchanged import WindowCounts
from accum_trainer.seeds import seed_of
from accum_trainer.sources.collating import PackingCollator, PaddingCollator, collated
from accum_trainer.sources.content import digest_of_sample
from accum_trainer.sources.drawing import SeededIndices
from accum_trainer.sources.lengths import find_lengths
from accum_trainer.sources.options import SourceOptions
from accum_trainer.sources.progress import Progress
from accum_trainer.sources.shares import Announced, Reading, WindowShares, read_shares
from accum_trainer.window_plan import Cut, Dealt, global_order, windows_of


class CountedRows:
    """A data set that knows the counts of its batches: no counting, no communication.

    Attributes:
        lengths: tokens of each sample, shape (samples,), int64.
        num_targets: targets of each sample, shape (samples,), int64.
    """

    lengths: np.ndarray
    num_targets: np.ndarray


class PlannedSource:
    """Windows of B_eff samples in the global order from (seed, epoch), split by a `Cut`.

    Args:
        dataset: has `__getitem__` and `__len__`.
        plan: B, K, W and the global batch size.
        rank: of this process.
        options: how to read it. With `prefetch`, shares are made in a thread, which leaves the
            global random generators alone.
        progress: the position in the data set.

    Raises:
        DataError: the data set or its shard is empty, or there are not as many lengths as samples.
    """

    unit = "samples"
    alike = True
    is_read_once = False

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        rank: int,
        options: SourceOptions,
        progress: Progress | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("the data set is empty; there is no window to train on")
        given = options.lengths if options.lengths is not None else find_lengths(dataset)
        self._lengths = (
            np.ones(len(dataset), dtype=np.int64) if given is None else np.asarray(given)
        )
        if len(self._lengths) != len(dataset):
            raise DataError(
                f"{len(self._lengths)} lengths are given for a data set of {len(dataset)} samples"
            )
        self._dataset, self._plan, self._rank, self._options = dataset, plan, rank, options
        self._progress = progress or Progress()
        self._cut = options.cut or Cut(plan.micro_batch_size)
        # Every rank knows the counts of all: these collators neither add nor drop a target.
        self.knows_counts = isinstance(dataset, CountedRows) and isinstance(
            options.collate_fn, (PaddingCollator, PackingCollator)
        )
        self._num_targets = dataset.num_targets if self.knows_counts else None
        self.reads_ahead = options.num_workers > 0
        self._draws_here = not self.reads_ahead and not options.prefetch
        first, shards = options.shard
        self._shard = slice(first, None, shards)
        if not range(len(dataset))[self._shard]:
            raise DataError(
                f"shard {first}/{shards} of {len(dataset)} samples is empty; use at most "
                f"{len(dataset)}"
            )

    def num_windows(self) -> int:
        return -(-len(range(len(self._dataset))[self._shard]) // self._plan.global_batch_size)

    def order(self) -> None:
        """None: (seed, epoch) gives the order."""

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        plan = self._plan
        if self._options.noise_every:
            return None  # windows that are cut at random may have more
        by_tokens = self._cut.packed or self._cut.max_tokens is not None
        if by_tokens or self._cut.rank_weights is not None:
            return None  # each window's lengths decide
        if not (plan.is_whole or plan.world_size == 1 or self._cut.equal_counts):
            return None  # the lengths decide which rank runs one more
        order = self._order(epoch)
        whole, rest = divmod(len(order), plan.global_batch_size)
        first, last = order[: plan.global_batch_size if whole else 0], order[len(order) - rest :]
        return whole, self._counts_of(first), self._counts_of(last)

    def _counts_of(self, window: np.ndarray) -> list[int]:
        """Micro-batches of a window on each rank; [] for an empty window."""
        if not len(window):
            return []
        by_rank = self._cut.assign_to_ranks(self._lengths[window], self._plan.world_size)
        return [len(own) for own in by_rank]

    def _order(self, epoch: int) -> np.ndarray:
        size, options = len(self._dataset), self._options
        order = global_order(size, options.seed, epoch) if options.shuffle else np.arange(size)
        return order[self._shard]

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        announced: deque[Announced] = deque()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._micro_batches(epoch, consumed, announced),
            collate_fn=self._options.collate_fn or collated,
            num_workers=self._options.num_workers,
            pin_memory=self._options.pin_memory,
            # The loader draws its workers' seed at each start. Drawn from the stream that dropout
            # uses, it would make a resumed run differ from one never stopped.
            generator=torch.Generator().manual_seed(self._seed_of("workers", epoch, consumed)),
        )
        reading = Reading(lambda: iter(loader))
        seed = (lambda at: self._seed_of("data", epoch, at)) if self._draws_here else None
        return WindowShares(
            read_shares(reading, announced, consumed, seed), reading if self.reads_ahead else None
        )

    def _seed_of(self, purpose: str, epoch: int, position: int) -> int:
        seed, shard = self._options.seed, self._shard.start
        return seed_of(purpose, seed, epoch=epoch, rank=self._rank, shard=shard, position=position)

    def _micro_batches(
        self, epoch: int, consumed: int, announced: deque[Announced]
    ) -> Iterator[list[int]]:
        """Yield this rank's micro-batches as lists of sample indices; announce each window.

        A rank without a sample of a window loads the window's shortest one as a filler.
        """
        plan = self._plan
        for window in windows_of(self._order(epoch), plan.global_batch_size, start=consumed):
            lengths = self._lengths[window]
            by_rank = self._cut_at_random(epoch, consumed, lengths)
            is_random = by_rank is not None
            by_rank = by_rank or self._cut.assign_to_ranks(lengths, plan.world_size)
            mine = by_rank[self._rank]
            begin, consumed = consumed, consumed + len(window)
            counts = None
            if self._num_targets is not None:
                targets = self._num_targets[window]
                counts = [self._counts(targets, lengths, own) for own in by_rank]
            sample = self._sample(int(window[0]))
            # Ranks that know other lengths would cut and deal the same window differently.
            fingerprint = zlib.crc32(lengths.tobytes(), zlib.crc32(window.tobytes()))
            # So would one that measures the noise of it.
            fingerprint = zlib.crc32(b"at random", fingerprint) if is_random else fingerprint
            announced.append(
                Announced(len(mine), consumed, fingerprint, counts, sample, is_random=is_random)
            )
            filler = [[int(window[lengths.argmin()])]]
            batches = [window[micro_batch].tolist() for micro_batch in mine] or filler
            if self._draws_here or self.reads_ahead:
                # A window has at least as many samples as micro-batches, so no position is reused.
                batches = [
                    SeededIndices(b, self._seed_of("data", epoch, begin + i))
                    for i, b in enumerate(batches)
                ]
            yield from batches

    def _cut_at_random(self, epoch: int, consumed: int, lengths: np.ndarray) -> Dealt | None:
        """The cut of the window after `consumed` samples if its noise is measured; else None.

        By its number, so that a resumed run measures the same windows. One that is short, or too
        small to be cut, is not measured.
        """
        size, every = self._plan.global_batch_size, self._options.noise_every
        number = epoch * self.num_windows() + consumed // size + 1
        if not every or number % every or len(lengths) < size:
            return None
        return self._cut.assign_at_random(lengths, self._plan.world_size)

    def _sample(self, index: int) -> int:
        """The digest of this sample in the source's first window; 0 later."""
        if self._progress.has_compared or self._plan.world_size == 1 or self.knows_counts:
            return 0
        self._progress.has_compared = True
        workers = {"num_workers": 1} if self.reads_ahead else {}
        draws = self._draws_here or self.reads_ahead
        return digest_of_sample(self._dataset, index, draws, **workers)

    def _counts(
        self, targets: np.ndarray, lengths: np.ndarray, own: list[np.ndarray]
    ) -> WindowCounts:
        """The counts of one rank, whose micro-batches are indices into the window."""
        all_own = np.concatenate([np.empty(0, dtype=np.int64), *own])
        return WindowCounts(
            num_targets=float(targets[all_own].sum()),
            num_micro_batches=float(len(own)),
            num_samples=float(len(all_own)),
            num_tokens=float(lengths[all_own].sum()),
            num_positions=float(sum(self._cut.positions(lengths[batch]) for batch in own)),
        )
