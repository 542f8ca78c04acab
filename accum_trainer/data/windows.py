"""A source of data as windows: this rank's micro-batches of each optimizer update.

Three kinds of source, one contract (`Source.parts`):

    PlannedSource   a map-style data set: windows in the global order, cut and dealt by `window_plan`
    LoaderSource    a DataLoader: its batches in its order, dealt to ranks in turn
    StreamSource    batches that are this rank's already

No rank talks to another here. Where all ranks must have read the same thing, a part carries a fingerprint of it, and
the accumulator compares.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.data.collating import PackingCollator, PaddingCollator
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.errors import DataError
from accum_trainer.window_plan import Cut, global_order, windows_of

Batch = Any
Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True)
class Part:
    """This rank's part of one window.

    Attributes:
        batches: this rank's micro-batches; may be none.
        filler: a batch to run with weight 0 where an exchange needs this rank and it has none of its own.
        consumed: what of the epoch is used up once this window is done, in the source's unit.
        fingerprint: equal on all ranks that cut the same window; 0 where ranks read their own data.
        table: targets, micro-batches, samples, tokens and positions of each rank, shape (ranks, 5), where the source knows
            them without asking; then nothing has to be exchanged before the window begins.
    """

    batches: list[Batch]
    filler: Batch | None
    consumed: int
    fingerprint: int = 0
    table: np.ndarray | None = None


Parts = Generator[Part, None, None]


class Source(Protocol):
    """Where windows come from.

    Attributes:
        unit: what `consumed` counts: "samples" or "batches".
        knows_counts: each part has a `table`, so that nothing has to be exchanged.
        reads_ahead: the next part is made elsewhere and draws no random numbers here, so that it may be asked for before the
            update of the one in hand.
    """

    unit: str
    knows_counts: bool
    reads_ahead: bool

    def parts(self, epoch: int, consumed: int) -> Parts:
        """This rank's parts of the windows of `epoch`, from where `consumed` units are used up."""

    def num_windows(self) -> int | None:
        """Windows in one epoch, or None where the source has no length."""


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
    shard: tuple[int, int] = (0, 1),
    cut: Cut | None = None,
    prefetch: bool = False,
) -> Source:
    """Pick the kind of source that `data` is; `already_sharded` says that a loader gives this rank's batches only."""
    if isinstance(data, DataLoader):
        if collate_fn is not None:
            raise DataError("collate_fn is given, but a DataLoader collates by its own; set it there")
        if already_sharded:
            return StreamSource(data, plan)
        _check_batch_size(data, plan)
        if _splits_by_rank(data):
            return StreamSource(data, plan)
        return LoaderSource(data, plan, rank, seed)
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        source = PlannedSource(
            data, plan, rank, collate_fn, lengths, seed, shuffle, num_workers, pin_memory, shard, cut
        )
        return Prefetched(source) if prefetch else source
    if shard != (0, 1) or cut is not None:
        what = f"shard={shard} is a share" if shard != (0, 1) else "cut decides the micro-batches"
        raise DataError(f"{what} of a map-style data set; {type(data).__name__} is none")
    if isinstance(data, Iterable):
        if collate_fn is not None:
            raise DataError("collate_fn is given, but a stream yields batches, not samples; collate before")
        return StreamSource(data, plan)
    raise DataError(
        f"{type(data).__name__} is no source of windows; give a map-style data set, a DataLoader or an iterable of batches"
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


def _splits_by_rank(loader: DataLoader) -> bool:
    """Whether this loader already gives each rank a share of its own (as DistributedSampler does)."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    by_sampler = hasattr(sampler, "num_replicas")
    by_dataset = getattr(loader.dataset, "_distributed", None) is not None  # datasets.distributed.split_dataset_by_node
    return by_sampler or by_dataset


@dataclass(frozen=True)
class _Announced:
    """A window that a batch sampler has begun: workers load ahead of training, so it is noted when it is sampled."""

    num_batches: int
    consumed: int
    fingerprint: int
    table: np.ndarray | None = None


def _read_parts(loader: DataLoader, ahead: deque[_Announced]) -> Parts:
    """Group what `loader` yields into parts, as its batch sampler announced them."""
    batches = iter(loader)
    for first in batches:
        window = ahead.popleft()
        if window.num_batches == 0:
            yield Part([], first, window.consumed, window.fingerprint, window.table)
        else:
            mine = [first, *islice(batches, window.num_batches - 1)]
            yield Part(mine, mine[-1], window.consumed, window.fingerprint, window.table)


class PlannedSource:
    """A map-style data set: the global order from (seed, epoch), windows of B_eff samples, cut and dealt by `cut`.

    Args:
        dataset: has `__getitem__` and `__len__`; its attribute `lengths`, if any, is used where `lengths` is None.
        lengths: tokens of each sample, shape (len(dataset),); lets the cut avoid padding.
        shuffle: False keeps the data set's own order.
        shard: (i, n), every n-th sample of the order from the i-th; the n shards hold each sample exactly once.
        cut: how windows become micro-batches.
    """

    unit = "samples"

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
        self._shard = slice(shard[0], None, shard[1])
        if not range(len(dataset))[self._shard]:
            raise DataError(
                f"shard {shard[0]}/{shard[1]} of {len(dataset)} samples is empty; use at most {len(dataset)}"
            )

    def num_windows(self) -> int:
        return -(-len(range(len(self._dataset))[self._shard]) // self._plan.global_batch_size)

    def parts(self, epoch: int, consumed: int) -> Parts:
        ahead: deque[_Announced] = deque()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._micro_batches(epoch, consumed, ahead),
            collate_fn=self._collate_fn,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # A generator of its own: the loader draws a seed at each start, and must not draw it from the stream that
            # dropout uses, or a resumed run would differ from one never stopped.
            generator=torch.Generator(),
        )
        yield from _read_parts(loader, ahead)

    def _micro_batches(self, epoch: int, consumed: int, ahead: deque[_Announced]) -> Iterator[list[int]]:
        """Yield this rank's micro-batches as lists of sample indices, announcing each window in `ahead`.

        A rank with no sample of a window loads one of it as filler: its shortest.
        """
        plan, size = self._plan, len(self._dataset)
        order = (global_order(size, self._seed, epoch) if self._shuffle else np.arange(size))[self._shard]
        for window in windows_of(order, plan.global_batch_size, start=consumed):
            lengths = self._lengths[window]
            dealt = self._cut.deal(lengths, plan.world_size)
            mine = dealt[self._rank]
            consumed += len(window)
            table = None
            if self._num_targets is not None:
                targets = self._num_targets[window]
                table = np.array([self._counts(targets, lengths, own) for own in dealt], dtype=float)
            ahead.append(_Announced(len(mine), consumed, zlib.crc32(window.tobytes()), table))
            filler = [[int(window[lengths.argmin()])]]
            yield from ([window[micro_batch].tolist() for micro_batch in mine] or filler)

    def _counts(self, targets: np.ndarray, lengths: np.ndarray, own: list[np.ndarray]) -> list[int]:
        """Targets, micro-batches, samples, tokens and positions of one rank's micro-batches."""
        all_own = np.concatenate([np.empty(0, dtype=np.int64), *own])
        positions = sum(self._cut.positions(lengths[micro_batch]) for micro_batch in own)
        return [int(targets[all_own].sum()), len(own), len(all_own), int(lengths[all_own].sum()), positions]


class Prefetched:
    """Another source's parts, each made in a thread while the one before it is trained on.

    Reading, cutting, collating and pinning happen off the critical path. One part is ready and one is being made, beside
    one that may have been asked for ahead; more would only hold memory. Draws from the global random generators in a data set's `__getitem__` would interleave with
    the training's own: such data is read without this.
    """

    def __init__(self, source: PlannedSource) -> None:
        self._source = source
        self.unit = source.unit
        self.knows_counts, self.reads_ahead = source.knows_counts, True

    def num_windows(self) -> int | None:
        return self._source.num_windows()

    def parts(self, epoch: int, consumed: int) -> Parts:
        ready: queue.Queue[Part | BaseException | None] = queue.Queue(maxsize=1)
        given_up = threading.Event()

        def put(item: Part | BaseException | None) -> None:
            while not given_up.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def make() -> None:
            try:
                for part in self._source.parts(epoch, consumed):
                    put(part)
                    if given_up.is_set():
                        return
                put(None)
            except BaseException as error:  # raised again where the part is asked for
                put(error)

        def stop() -> None:
            given_up.set()
            maker.join()

        maker = threading.Thread(target=make, name="windows", daemon=True)
        maker.start()
        # A thread that is inside a library while the interpreter goes down takes the process with it.
        atexit.register(stop)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop()
            atexit.unregister(stop)


class LoaderSource:
    """A user's DataLoader: K x W of its batches make a window, batch i goes to rank i % W, each sample once.

    Where the loader has a batch sampler, a rank loads its own batches only; otherwise it reads all and keeps its own.
    A RandomSampler without a generator is given one from (seed, epoch), so that ranks and restarts agree.
    """

    unit = "batches"

    def __init__(self, loader: DataLoader, plan: BatchPlan, rank: int, seed: int) -> None:
        self._loader, self._plan, self._rank, self._seed = loader, plan, rank, seed
        self._per_window = plan.gradient_accumulation_steps * plan.world_size
        self._by_index = loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        self.knows_counts = False
        # A stream may depend on the update before: what it gives is asked for when it is needed.
        self.reads_ahead = loader.num_workers > 0 and self._by_index

    def num_windows(self) -> int | None:
        try:
            return -(-len(self._loader) // self._per_window)
        except TypeError:
            return None

    def parts(self, epoch: int, consumed: int) -> Parts:
        sampler = getattr(self._loader.batch_sampler, "sampler", self._loader.sampler)
        _set_epoch(sampler, epoch)
        lent = sampler if isinstance(sampler, RandomSampler) and sampler.generator is None else None
        if lent is not None:
            lent.generator = torch.Generator().manual_seed((self._seed << 32) + epoch)
        try:
            yield from (self._dealt_by_index if self._by_index else self._dealt_by_reading)(consumed)
        finally:
            if lent is not None:
                lent.generator = None

    def _dealt_by_index(self, consumed: int) -> Parts:
        loader, world_size = self._loader, self._plan.world_size
        ahead: deque[_Announced] = deque()

        def mine() -> Iterator[list[Any]]:
            used = consumed
            assert loader.batch_sampler is not None
            batches = islice(iter(loader.batch_sampler), consumed, None)
            while window := list(islice(batches, self._per_window)):
                used += len(window)
                own = window[self._rank :: world_size]
                ahead.append(_Announced(len(own), used, zlib.crc32(repr(window).encode())))
                yield from (own or window[:1])

        yield from _read_parts(_with_batch_sampler(loader, mine()), ahead)

    def _dealt_by_reading(self, consumed: int) -> Parts:
        batches = islice(iter(self._loader), consumed, None)
        while window := list(islice(batches, self._per_window)):
            consumed += len(window)
            own = window[self._rank :: self._plan.world_size]
            yield Part(own, window[0], consumed, _content_fingerprint(window))


def _with_batch_sampler(loader: DataLoader, batch_sampler: Any) -> DataLoader:
    """The same loader over other batches of indices."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator or torch.Generator(),
        prefetch_factor=loader.prefetch_factor,
    )


def _content_fingerprint(batches: list[Batch]) -> int:
    fingerprint = 0
    for batch in batches:
        tensor = first_tensor(batch)
        if tensor is not None:
            fingerprint = zlib.crc32(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), fingerprint
            )
    return fingerprint


class StreamSource:
    """Batches that are this rank's already, K at a time; ranks may run out at different windows."""

    unit = "batches"
    knows_counts = reads_ahead = False  # it may make its batches as they are asked for

    def __init__(self, batches: Iterable[Batch], plan: BatchPlan) -> None:
        self._batches, self._plan = batches, plan

    def num_windows(self) -> int | None:
        if self._plan.world_size > 1 or not isinstance(self._batches, Sized):
            return None  # another rank's stream may be longer
        return -(-len(self._batches) // self._plan.gradient_accumulation_steps)

    def parts(self, epoch: int, consumed: int) -> Parts:
        _set_epoch(getattr(self._batches, "sampler", None), epoch)
        batches = islice(iter(self._batches), consumed, None)
        filler = None
        while window := list(islice(batches, self._plan.gradient_accumulation_steps)):
            consumed += len(window)
            filler = window[-1]
            yield Part(window, filler, consumed)
        while True:  # other ranks may still have data; the accumulator ends the epoch when none has
            yield Part([], filler, consumed)


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch (DistributedSampler and its kind) which one it is."""
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def first_tensor(batch: Batch) -> torch.Tensor | None:
    """The first tensor of a batch (a tensor, a mapping, a sequence or a data class of them), or None."""
    if isinstance(batch, torch.Tensor):
        return batch
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    elif hasattr(batch, "__dict__"):
        values = vars(batch).values()
    return next((tensor for value in values if (tensor := first_tensor(value)) is not None), None)


def num_samples(batch: Batch) -> int:
    """Samples of a batch: the first dimension of its first tensor (1 where it has none); where they lie end to end in one
    row, as many as `position_ids` begin anew."""
    if isinstance(batch, Mapping) and is_packed(batch):
        return int((batch["position_ids"] == 0).sum())
    tensor = first_tensor(batch)
    return 1 if tensor is None or tensor.ndim == 0 else int(tensor.shape[0])


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether the samples lie end to end in one row, each with positions that begin at 0."""
    positions = batch.get("position_ids")
    return isinstance(positions, torch.Tensor) and positions.shape[0] == 1 and "attention_mask" not in batch


def num_tokens(batch: Batch) -> tuple[int, int]:
    """(tokens, positions) of a batch's `input_ids`: without and with padding; (0, 0) where it has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor):
        return 0, 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, torch.Tensor) else ids.numel(), ids.numel()
