"""A user's DataLoader as windows: its batches in its order, batch i to rank i % W.

Knows torch's DataLoader and its samplers, but no other rank.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from accum_trainer.batch import Batch, first_tensor
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.seeds import seed_of
from accum_trainer.sources.drawing import SeededIndices, drawing_from
from accum_trainer.sources.progress import Progress
from accum_trainer.sources.shares import Announced, Reading, WindowShare, WindowShares, read_shares


class LoaderSource:
    """K x W batches of a user's DataLoader make a window; each sample is trained once.

    If the loader has a batch sampler, a rank loads only its own batches; otherwise it reads all and
    keeps its own. The loader's own generator is used as it is. Anything that its sampler and data
    draw from the global generators comes from (seed, epoch, position), so that ranks and restarts
    agree on the order.

    Args:
        loader: not sharded.
        plan: B, K, W and the global batch size.
        rank: of this process.
        seed: replaces that of a loader without a generator.
        progress: the position in the loader; it keeps the workers of persistent ones.
    """

    unit = "batches"
    alike = True
    is_read_once = False

    def __init__(
        self, loader: DataLoader[Any], plan: BatchPlan, rank: int, seed: int, progress: Progress
    ) -> None:
        self._loader, self._plan, self._rank, self._seed = loader, plan, rank, seed
        self._progress = progress
        self._per_window = plan.gradient_accumulation_steps * plan.world_size
        # A stateful loader counts its reads, so it must do the reading.
        is_map_style = loader.batch_sampler is not None and not isinstance(
            loader.dataset, IterableDataset
        )
        self._by_index = is_map_style and not is_stateful(loader)
        self.knows_counts = False
        self.reads_ahead = may_be_read_early(loader)

    def num_windows(self) -> int | None:
        try:
            return -(-len(self._loader) // self._per_window)
        except TypeError:
            return None

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        try:
            whole, rest = divmod(len(self._loader), self._per_window)
        except TypeError:
            return None
        w = self._plan.world_size
        tail = [len(range(rank, rest, w)) for rank in range(w)] if rest else []
        return whole, [self._plan.gradient_accumulation_steps] * w, tail

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        if self._by_index:
            announced: deque[Announced] = deque()
            reading = Reading(
                lambda: iter(self._over(self._mine(epoch, consumed, announced), epoch, consumed))
            )
            early = reading if self.reads_ahead else None
            seed = (
                None
                if self._loader.num_workers
                else lambda at: self._seed_of("data", epoch, at, self._rank)
            )
            return WindowShares(read_shares(reading, announced, consumed, seed), early)
        reading = Reading(lambda: self._begin(epoch))
        early = reading if self.reads_ahead else None
        return WindowShares(
            self._shares_of_all(reading, epoch, consumed), early, self._plan.world_size
        )

    def _over(self, batches: Iterator[Any], epoch: int, consumed: int) -> DataLoader[Any]:
        """The user's loader, its class and options, over these batches of indices."""
        kept: DataLoader[Any] | None = self._progress.workers.loader
        if kept is not None:  # its workers are alive
            kept.batch_sampler.batches = batches  # type: ignore[union-attr]
            return kept
        loader = copy.copy(self._loader)
        loader._iterator = None  # noqa: SLF001 the copy must not share torch's persistent workers
        vars(loader)["batch_sampler"] = _GivenBatches(batches)  # DataLoader.__setattr__ refuses it
        loader.generator = torch.Generator().manual_seed(
            self._seed_of("workers", epoch, consumed, self._rank)
        )
        if loader.persistent_workers:
            self._progress.workers.loader = loader
        return loader

    def _mine(self, epoch: int, consumed: int, announced: deque[Announced]) -> Iterator[Any]:
        """This rank's batches of indices; batch i of an epoch has the same seed on every rank."""
        batches: Iterator[Any] = iter(())
        used = 0
        while True:
            with drawing_from(self._seed_of("order", epoch, used)):
                if used == 0:
                    set_epoch(self._loader, epoch)
                    self._begin_order(epoch)
                    batches = iter(self._loader.batch_sampler)  # type: ignore[arg-type]
                window = list(
                    islice(
                        batches,
                        min(self._per_window, consumed - used)
                        if used < consumed
                        else self._per_window,
                    )
                )
            if not window:
                return
            begin, used = used, used + len(window)
            if used <= consumed:
                continue
            numbered = list(enumerate(window, start=begin))
            own = numbered[self._rank :: self._plan.world_size]
            announced.append(Announced(len(own), used, zlib.crc32(repr(window).encode())))
            for number, indices in own or numbered[:1]:
                if isinstance(indices, (list, tuple)):
                    indices = SeededIndices(indices, self._seed_of("data", epoch, number))
                yield indices

    def _begin_order(self, epoch: int) -> None:
        """Restore the loader's own generators to the start of this epoch; record their state."""
        progress, loader = self._progress, self._loader
        for generator, state in zip(self._generators(), progress.loaded_order or (), strict=False):
            generator.set_state(state)
        progress.order, progress.loaded_order = self.order(), None
        if loader.generator is not None and not (loader.persistent_workers and epoch):
            # A loader draws its workers' seed here; drawing it too keeps the order of a plain loop.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)

    def order(self) -> list[torch.Tensor] | None:
        return [generator.get_state() for generator in self._generators()] or None

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators that its order is drawn from."""
        batch_sampler = self._loader.batch_sampler
        owners = (
            (self._loader, batch_sampler, getattr(batch_sampler, "sampler", None))
            if self._by_index
            else ()
        )
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _begin(self, epoch: int) -> Iterator[Batch]:
        set_epoch(self._loader, epoch)
        with workers_seeded(self._loader, self._seed_of("workers", epoch, 0)):
            return iter(self._loader)

    def _shares_of_all(
        self, batches: Iterator[Batch], epoch: int, consumed: int
    ) -> Generator[WindowShare, None, None]:
        used = 0
        while True:
            with drawing_from(self._seed_of("data", epoch, used)):  # equal on all ranks
                window = list(
                    islice(
                        batches,
                        min(self._per_window, consumed - used)
                        if used < consumed
                        else self._per_window,
                    )
                )
            if not window:
                return
            used += len(window)
            if used > consumed:
                own = window[self._rank :: self._plan.world_size]
                yield WindowShare(own, window[0], used, _content_fingerprint(window))

    def _seed_of(self, purpose: str, epoch: int, position: int, rank: int = 0) -> int:
        given = self._loader.generator
        seed = self._seed if given is None else given.initial_seed()
        return seed_of(purpose, seed, epoch=epoch, rank=rank, position=position)


class _GivenBatches:
    """The batch sampler of a copied loader: the batches of the current epoch."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def is_stateful(loader: DataLoader[Any]) -> bool:
    """Whether the loader can save its position.

    accelerate's loaders always have the method; an attribute says if it works.
    """
    return getattr(loader, "use_stateful_dataloader", hasattr(loader, "state_dict"))


def may_be_read_early(loader: Any) -> bool:
    """Whether the next batches may be taken before the current update.

    Workers have started them anyway, and they do not depend on the update.
    """
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and not is_stateful(loader)


def set_epoch(loader: Any, epoch: int) -> None:
    """Call `set_epoch` on everything in `loader` that shuffles by epoch.

    That is accelerate's loaders, DistributedSampler and streams of `datasets`.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
    for part in (loader, batch_sampler, sampler, getattr(loader, "dataset", None)):
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


@contextlib.contextmanager
def workers_seeded(loader: DataLoader[Any], seed: int) -> Iterator[None]:
    """Seed the workers that start inside by `seed`, if the loader has no generator."""
    is_lent = loader.generator is None
    if is_lent:
        loader.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        if is_lent:
            loader.generator = None


def _content_fingerprint(batches: Iterable[Batch]) -> int:
    """A CRC-32 of the first tensor of each batch."""
    fingerprint = 0
    for batch in batches:
        tensor = first_tensor(batch)
        if tensor is not None:
            fingerprint = zlib.crc32(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), fingerprint
            )
    return fingerprint
