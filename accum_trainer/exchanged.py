"""The few numbers that ranks exchange: one row per rank, before a window begins and at its end.

Knows the columns of both exchanges, and nothing of sources, engines or tensors.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np
import torch

from accum_trainer.errors import DataError, EngineError


class WindowCounts(NamedTuple):
    """Counts of one rank's share of a window, exchanged before the window begins.

    Attributes:
        num_targets: terms of the loss in it; a sum of weights if the loss weighs them.
        num_micro_batches, num_samples: as planned.
        num_tokens, num_positions: of `input_ids`, without and with padding.
        fingerprint: of the samples it read.
        can_read_ahead: the rank can count its next window before this one has ended.
        has_nothing: the rank has no batch at all, not even one to run with weight 0.
        has_failed: the rank could not read its share.
        is_beginning: the rank begins a source whose loss is not decided yet, and has no counts.
        sample: digest of one sample, the same index on all ranks; 0 means nothing.
        is_random: the noise of the window's gradient is measured.
    """

    num_targets: float
    num_micro_batches: float
    num_samples: float
    num_tokens: float
    num_positions: float
    fingerprint: float = 0.0
    can_read_ahead: float = 0.0
    has_nothing: float = 0.0
    has_failed: float = 0.0
    is_beginning: float = 0.0
    sample: float = 0.0
    is_random: float = 0.0

    def to_row(self) -> list[float]:
        return [float(value) for value in self]

    @classmethod
    def from_rows(cls, table: np.ndarray) -> list[WindowCounts]:
        """Every rank's counts, from shape (ranks, columns); columns that are missing are 0."""
        return [cls(*row) for row in table.tolist()]


def check_read(counts: list[WindowCounts]) -> None:
    """Raise a DataError if a rank could not read, is elsewhere, or has no batch to run."""
    check_beginnings(counts, together=False)
    for rank, one in enumerate(counts):
        if one.has_failed:
            raise DataError(
                f"process {rank} could not read its next window; its own message says why"
            )
    if not any(one.num_micro_batches for one in counts):
        return
    measured = [bool(one.is_random) for one in counts if one.num_micro_batches]
    if any(measured) and not all(measured):
        raise DataError(
            "the noise of this window's gradient is measured on some processes and not on others, "
            "and such a window is cut differently; give noise_every alike on all processes"
        )
    for rank, one in enumerate(counts):
        if one.has_nothing and not one.num_micro_batches:
            raise DataError(
                f"process {rank} has no batch at all while others have; give every process at "
                "least one batch, or a DataLoader that is dealt to them"
            )


def check_beginnings(counts: list[WindowCounts], together: bool) -> None:
    """Raise a DataError unless all ranks begin a source `together`, or none does."""
    apart = [rank for rank, one in enumerate(counts) if bool(one.is_beginning) != together]
    if apart:
        begins = [rank for rank, one in enumerate(counts) if one.is_beginning]
        raise DataError(
            f"process {begins[0]} begins an epoch while others are in the middle of one; leave a "
            "loop over windows or batches on all processes at the same update"
        )


def check_own_data(fingerprints: list[float]) -> None:
    """Raise a DataError if two ranks were given the same stream; 0 says too little to tell."""
    for number in fingerprints:
        ranks = [rank for rank, other in enumerate(fingerprints) if number and other == number]
        if len(ranks) > 1:
            raise DataError(
                f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} read the same "
                f"batches, which would count as {len(ranks)} times as much data. Give each process "
                f"its own, as in itertools.islice(stream, rank, None, {len(fingerprints)}), or "
                "pass a DataLoader, whose batches are dealt to the processes"
            )


def check_same_sample(samples: list[float]) -> None:
    """Raise a DataError if an index means different samples on two ranks; 0 says nothing."""
    said = [(rank, sample) for rank, sample in enumerate(samples) if sample]
    for rank, sample in said:
        if sample != said[0][1]:
            raise DataError(
                f"processes {said[0][0]} and {rank} read different samples at the same index of "
                "the data set, as if it was already split by rank: each sample is dealt to one "
                "process, so the others' would be skipped. Pass the whole data set, or "
                "iter(batches) for batches that are each process's own. If only augmentation "
                "differs, draw it from the global generators, which are seeded, or by the index "
                "alone"
            )


def refuse_other_windows(positions: list[tuple[int, int, int, int]]) -> NoReturn:
    """Raise an EngineError that says which window (its `Position`) each rank was in."""
    other = next(rank for rank, position in enumerate(positions) if position != positions[0])
    said = [
        f"process {rank}: {updates} updates, epoch {epoch}, {consumed} consumed, window "
        f"{fingerprint:08x}"
        for rank, (updates, epoch, consumed, fingerprint) in enumerate(positions)
    ]
    raise EngineError(
        f"process {other} trained on another window than process 0 ({'; '.join(said)}), so "
        "this update would belong to no batch; give all processes the same data, seed and position"
    )


class WindowEnd(NamedTuple):
    """One rank's numbers in the exchange that ends a window.

    Attributes:
        loss_sum: the rank's losses, summed over targets; a tensor, shape (), until it has been
            exchanged.
        stop_requested, save_requested: `request_stop`, `request_save` was called there.
        num_splits: micro-batches that it cut in two.
        num_micro_batches: micro-batches that it ran.
        position: a checksum of the window's `Position`; 0 if each rank reads its own data.
    """

    loss_sum: float | torch.Tensor
    stop_requested: float
    save_requested: float
    num_splits: float
    num_micro_batches: float
    position: float

    def to_row(self, behind: list[float | torch.Tensor]) -> list[float | torch.Tensor]:
        """The row; norms of this window and counts of the next may travel `behind` it."""
        loss_sum, *rest = self
        return [loss_sum, *map(float, rest), *behind]

    @classmethod
    def from_rows(cls, table: np.ndarray) -> tuple[list[WindowEnd], np.ndarray]:
        """Every rank's numbers, and what travelled behind them: shape (ranks, columns)."""
        size = len(cls._fields)
        return [cls(*row) for row in table[:, :size].tolist()], table[:, size:]
