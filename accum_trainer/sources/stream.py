"""Batches that are already this rank's, and a fingerprint that reveals two ranks with equal ones.

Knows no other rank: the accumulator compares the fingerprints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from itertools import islice

import torch

from accum_trainer.batch import Batch, tensors_of
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.sources.loader import may_be_read_early, set_epoch, workers_seeded
from accum_trainer.sources.shares import Reading, WindowShare, WindowShares

# Two streams are the same if they agree from their start in this many different samples, in at
# least two different batches. Ranks that draw from N samples agree by chance with probability
# N ** -8, and N is at least 8.
ENOUGH_SAMPLES = 8
# A stream with fewer different samples in this many batches is (nearly) constant and not compared.
MOST_BATCHES = 128


class StreamSource:
    """Batches that are already this rank's, K per window; ranks may end at different windows.

    Args:
        batches: of this rank.
        plan: K and W.
        workers_seed: from an epoch, the seed of a DataLoader's workers; None leaves them alone.
        early: workers' batches may be read before they are needed.
    """

    unit = "batches"
    knows_counts = alike = False

    def __init__(
        self,
        batches: Iterable[Batch],
        plan: BatchPlan,
        workers_seed: Callable[[int], int] | None = None,
        early: bool = True,
    ) -> None:
        self._batches, self._plan, self._workers_seed = batches, plan, workers_seed
        self.is_read_once = hasattr(batches, "__next__")
        # Anything but workers may make its batches here, when they are read.
        self.reads_ahead = early and may_be_read_early(batches)
        self._read_before = 0  # batches, if they can be read only once

    def num_windows(self) -> int | None:
        if self._plan.world_size > 1 or not isinstance(self._batches, Sized):
            return None  # another rank's stream may be longer
        return -(-len(self._batches) // self._plan.gradient_accumulation_steps)

    def order(self) -> None:
        """None: the stream decides its order."""

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        if self._plan.world_size > 1 or not isinstance(self._batches, Sized):
            return None
        return 0, [], [len(self._batches)]

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        reading = Reading(lambda: self._begin(epoch))
        return WindowShares(self._read(reading, consumed), reading if self.reads_ahead else None)

    def _read(self, batches: Iterator[Batch], consumed: int) -> Generator[WindowShare, None, None]:
        for _ in islice(batches, max(0, consumed - self._read_before)):
            pass
        filler, content = None, Content() if self._plan.world_size > 1 else None
        while window := list(islice(batches, self._plan.gradient_accumulation_steps)):
            consumed += len(window)
            self._read_before = consumed if self.is_read_once else 0
            filler = window[-1]
            fingerprint = content.add(window) if content is not None else 0
            yield WindowShare(window, filler, consumed, fingerprint)
        while True:  # other ranks may have more; the accumulator ends the epoch when none has
            yield WindowShare([], filler, consumed)

    def _begin(self, epoch: int) -> Iterator[Batch]:
        set_epoch(self._batches, epoch)
        if self._workers_seed is None:
            return iter(self._batches)
        with workers_seeded(self._batches, self._workers_seed(epoch)):  # type: ignore[arg-type]
            return iter(self._batches)


class Content:
    """A fingerprint of a stream since its start, once that is enough to distinguish streams.

    One batch that is equal on several ranks proves nothing (overfitting on one batch, constant
    data); neither do many batches of a few samples.
    """

    def __init__(self) -> None:
        # 48 bits are exact in the float64 that ranks exchange.
        self._digest = hashlib.blake2b(digest_size=6)
        self._batches: set[bytes] = set()
        self._samples: set[bytes] = set()
        self._num_batches = 0
        self._ended = False

    def add(self, batches: list[Batch]) -> int:
        """The fingerprint after `batches` once it is conclusive; 0 before and after that."""
        for batch in [] if self._ended else batches:
            self._add(batch)
        if self._ended:
            return 0
        if len(self._batches) > 1 and len(self._samples) >= ENOUGH_SAMPLES:
            self._ended = True
            return int.from_bytes(self._digest.digest(), "big") or 1
        self._ended = self._num_batches >= MOST_BATCHES
        return 0

    def _add(self, batch: Batch) -> None:
        rows = [
            _rows(tensor)
            for tensor in tensors_of(batch)
            if tensor.layout == torch.strided and tensor.numel()
        ]
        whole = hashlib.blake2b(
            b"".join(row for of_tensor in rows for row in of_tensor), digest_size=16
        ).digest()
        self._digest.update(whole)
        self._batches.add(whole)
        self._num_batches += 1
        size = len(rows[0]) if rows else 0
        samples = zip(*(of_tensor for of_tensor in rows if len(of_tensor) == size), strict=True)
        self._samples.update(b"".join(sample) for sample in islice(samples, ENOUGH_SAMPLES))


def _rows(tensor: torch.Tensor) -> list[bytes]:
    """The bytes of each row of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    rows = plain.reshape(plain.shape[0] if plain.ndim else 1, -1)
    return [row.tobytes() for row in rows.view(torch.uint8).numpy()]
