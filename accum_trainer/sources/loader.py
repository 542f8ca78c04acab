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

from accum_trainer.batch import Batch
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import DataError
from accum_trainer.seeds import seed_of
from accum_trainer.sources.content import crc_of_batches, digest_of, digest_of_sample
from accum_trainer.sources.drawing import SeededIndices, drawing_from
from accum_trainer.sources.progress import Passed, Progress
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
        noise_every: the noise of the gradient is measured in every N-th window, whose batches are
            random samples; 0 for none.
    """

    unit = "batches"
    alike = True
    is_read_once = False

    def __init__(
        self,
        loader: DataLoader[Any],
        plan: BatchPlan,
        rank: int,
        seed: int,
        progress: Progress,
        noise_every: int = 0,
    ) -> None:
        self._loader, self._plan, self._rank, self._seed = loader, plan, rank, seed
        self._progress, self._noise_every = progress, noise_every
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
        skipped = self._progress.take_passed()
        passed: Passed | None = Passed(0)
        while True:
            with drawing_from(self._seed_of("order", epoch, used)):
                if used == 0:
                    set_epoch(self._loader, epoch)
                    self._begin_order(epoch)
                    batches = iter(self._loader.batch_sampler)  # type: ignore[arg-type]
                window = self._next_window(batches, used, consumed)
            if not window:
                return
            begin, used = used, used + len(window)
            passed = _passed(passed, window)
            if used <= consumed:
                if used == consumed:
                    _check_skipped(passed, skipped, epoch, used)
                continue
            numbered = list(enumerate(window, start=begin))
            own = numbered[self._rank :: self._plan.world_size]
            fingerprint = zlib.crc32(repr(window).encode())
            sample = self._sample(window[0])
            is_random = self._is_measured(epoch, used, len(window))
            announced.append(
                Announced(len(own), used, fingerprint, None, sample, passed, is_random)
            )
            for number, indices in own or numbered[:1]:
                if isinstance(indices, (list, tuple)):
                    indices = SeededIndices(indices, self._seed_of("data", epoch, number))
                yield indices

    def _is_measured(self, epoch: int, used: int, size: int) -> bool:
        """Whether the noise is measured in the window of `size` batches that ends at `used`."""
        every, windows = self._noise_every, self.num_windows()
        number = epoch * (windows or 0) + used // self._per_window
        return bool(every) and size == self._per_window and number % every == 0

    def _sample(self, batch: Any) -> int:
        """The digest of the first sample of this batch in the first window; 0 later."""
        progress, loader = self._progress, self._loader
        if progress.has_compared or self._plan.world_size == 1:
            return 0
        progress.has_compared = True
        workers = {
            "num_workers": 1,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
        index = next(iter(batch), None) if isinstance(batch, Iterable) else None
        is_read_here = loader.num_workers == 0
        return digest_of_sample(loader.dataset, index, True, **({} if is_read_here else workers))

    def _restore_order(self) -> bool:
        """Set the loader's own generators to the start of this epoch; record their state.

        Returns:
            whether it is the epoch of a loaded position.
        """
        progress = self._progress
        is_loaded = progress.loaded_order is not None
        for generator, state in zip(self._generators(), progress.loaded_order or (), strict=False):
            generator.set_state(state)
        progress.order, progress.loaded_order = self.order(), None
        return is_loaded

    def _next_window(self, batches: Iterator[Any], used: int, consumed: int) -> list[Any]:
        """The next batches, one window at most; those to be skipped end where the rest begins."""
        size = self._per_window
        return list(islice(batches, min(size, consumed - used) if used < consumed else size))

    def _begin_order(self, epoch: int) -> None:
        loader = self._loader
        self._restore_order()
        if loader.generator is not None and not (loader.persistent_workers and epoch):
            # A loader draws its workers' seed here; drawing it too keeps the order of a plain loop.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)

    def order(self) -> list[torch.Tensor] | None:
        return [generator.get_state() for generator in self._generators()] or None

    def _generators(self) -> list[torch.Generator]:
        """The loader's and its samplers' own generators, which its order is drawn from."""
        loader = self._loader
        batch_sampler = loader.batch_sampler
        found = [loader.generator]
        for owner in (batch_sampler, getattr(batch_sampler, "sampler", None), loader.sampler):
            found += getattr(owner, "__dict__", {}).values()
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _begin(self, epoch: int) -> Iterator[Batch]:
        loader = self._loader
        set_epoch(loader, epoch)
        # Workers that live on draw no seed from the loader's generator in a later epoch.
        is_kept = self._restore_order() and loader.persistent_workers and epoch > 0
        with workers_seeded(loader, self._seed_of("workers", epoch, 0), always=is_kept):
            return iter(self._loader)

    def _shares_of_all(
        self, batches: Iterator[Batch], epoch: int, consumed: int
    ) -> Generator[WindowShare, None, None]:
        used = 0
        skipped = self._progress.take_passed()
        passed: Passed | None = Passed(0, self._per_window)
        if consumed and skipped is not None and skipped.at_once != self._per_window:
            skipped = passed = None  # the content may depend on the windows
        while True:
            with drawing_from(self._seed_of("data", epoch, used)):  # equal on all ranks
                window = self._next_window(batches, used, consumed)
            if not window:
                return
            used += len(window)
            if passed is not None:
                passed = passed._replace(crc=crc_of_batches(window, passed.crc))
            if used > consumed:
                own = window[self._rank :: self._plan.world_size]
                yield WindowShare(
                    own,
                    window[0],
                    used,
                    crc_of_batches(window),
                    passed=passed,
                    is_random=self._is_measured(epoch, used, len(window)),
                )
            elif used == consumed:
                _check_skipped(passed, skipped, epoch, used)

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
def workers_seeded(loader: DataLoader[Any], seed: int, always: bool = False) -> Iterator[None]:
    """Seed the workers that start inside by `seed`, if the loader has no generator or `always`."""
    own = loader.generator
    if own is None or always:
        loader.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        loader.generator = own


def _passed(before: Passed | None, batches: list[Any]) -> Passed | None:
    """`before` and these batches of indices; None if they are no plain values."""
    if before is None:
        return None
    try:
        digest = b"".join(digest_of(batch).to_bytes(6, "big") for batch in batches)
    except TypeError:
        return None
    return before._replace(crc=zlib.crc32(digest, before.crc))


def _check_skipped(passed: Passed | None, saved: Passed | None, epoch: int, used: int) -> None:
    """Raise a DataError if a resumed epoch skips other samples than were trained on."""
    if passed is None or saved is None or passed == saved:
        return
    raise DataError(
        f"the DataLoader gives other batches than before in epoch {epoch}: the first {used}, which "
        f"the saved position skips, have checksum {passed.crc:08x} and had {saved.crc:08x}, so "
        "samples would be lost or repeated. Draw the order from a torch.Generator that is an "
        "attribute of the loader or its sampler (it is saved), from the global generators (they "
        "are seeded), or from the epoch in set_epoch(epoch); or resume from the end of an epoch. "
        "If only augmentation differs, remove consumed_crc from the saved position"
    )
