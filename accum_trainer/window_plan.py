"""The global order of samples, and the cut of one window into micro-batches.

A window is the set of samples of one optimizer update. Which samples those are depends on (seed,
epoch, B_eff) alone; how they are cut and dealt to processes is free, because the gradient is a sum
over the window. This module decides both and knows nothing of tensors, devices or engines.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# window[rank][step] -> positions of that micro-batch's samples inside the window
Dealt = list[list[np.ndarray]]


def global_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(num_samples)`, shape (num_samples,), int64, from (seed, epoch) alone.

    RandomState, not Generator: its stream is frozen by numpy's NEP 19, so that a run continued
    years later under another numpy still sees the same windows.
    """
    # Four words of 32 bits, the high ones last: small numbers seed as (seed, epoch) would, and no
    # two pairs give the same stream.
    words = [part >> shift & 0xFFFFFFFF for shift in (0, 32) for part in (seed, epoch)]
    bits = np.random.MT19937(np.random.SeedSequence(words))
    return np.random.RandomState(bits).permutation(num_samples).astype(np.int64)


def windows_of(order: np.ndarray, global_batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yield the windows of an epoch from sample `start` on: slices of `global_batch_size`, the last
    may be short."""
    for begin in range(start, len(order), global_batch_size):
        yield order[begin : begin + global_batch_size]


@dataclass(frozen=True)
class Cost:
    """The cost of a micro-batch, in tokens: `fixed + tokens + square * sum of length ** 2`.

    Tokens include padding. `fixed` is the cost of a forward and backward of any size (kernel
    launches, Python), `square` that of attention. The defaults are a GPU's: `fixed` is large, so a
    micro-batch is worth filling.
    """

    fixed: float = 2000.0
    square: float = 1e-4


@dataclass(frozen=True)
class Cut:
    """How windows are cut into micro-batches and dealt to ranks. Any cut gives the same gradient.

    Attributes:
        micro_batch_size: B, most samples of a micro-batch; None for no limit. Without `max_tokens`
            a window becomes the fewest micro-batches that B allows, with the least padding.
        max_tokens: most tokens of a micro-batch, padding counted. A window becomes the
            micro-batches of least cost.
        multiple: lengths are padded up to a multiple of this.
        packed: samples lie end to end, so that a micro-batch has no padding.
        cost: what a micro-batch costs.
        equal_counts: all ranks must run the same number of micro-batches.
        rank_weights: share of the work for each rank; None for equal shares.
    """

    micro_batch_size: int | None = None
    max_tokens: int | None = None
    multiple: int = 1
    packed: bool = False
    cost: Cost = Cost()
    equal_counts: bool = False
    rank_weights: tuple[float, ...] | None = None

    def assign_to_ranks(self, lengths: np.ndarray, world_size: int) -> Dealt:
        """Cut a window and deal it to `world_size` ranks.

        Sorted by length, so that neighbours need little padding; longest micro-batch first, so that
        a process that runs out of memory does so at once; each to the rank with the least cost for
        its share so far. A rank may come away with none.

        Args:
            lengths: tokens of each sample of the window, shape (samples,). All equal keeps the
                samples in their order.

        Returns:
            `dealt[rank][step]`: positions within the window, each position exactly once.
        """
        order = np.argsort(-lengths, kind="stable")
        padded = self.padded(lengths[order])
        weights = self.rank_weights or (1.0,) * world_size
        if self.equal_counts and self.rank_weights is not None:
            return self._deal_in_steps(order, padded, weights)
        ends = self._ends(padded)
        if self.equal_counts:
            return self._dealt(
                order, padded, self._split_to_multiple(padded, ends, world_size), weights
            )[1]
        if self.max_tokens is None:  # K micro-batches of B are what was asked for
            return self._dealt(order, padded, ends, weights)[1]
        # A few micro-batches more may be what lets the ranks end together.
        cuts = [ends]
        for more in range(3 if world_size > 1 else 0):
            cuts.append(
                self._split_to_multiple(
                    padded, cuts[-1], world_size, at_least=len(ends) + more * world_size
                )
            )
        return min(
            (self._dealt(order, padded, cut, weights) for cut in cuts), key=lambda found: found[0]
        )[1]

    def _dealt(
        self, order: np.ndarray, padded: np.ndarray, ends: list[int], weights: Sequence[float]
    ) -> tuple[float, Dealt]:
        """Each micro-batch to the rank that would be done with it first; the time of the last rank,
        and the deal.

        Longest processing time first (Graham 1969). Where B decides the count, no rank takes more
        than its part of it.
        """
        shares = np.array(weights, dtype=float)
        counted = self.max_tokens is None or self.equal_counts
        room = (
            np.ceil(len(ends) * shares / shares.sum() - 1e-9)
            if counted
            else np.full(len(shares), np.inf)
        )
        loads, taken = np.zeros(len(shares)), np.zeros(len(shares))
        dealt: Dealt = [[] for _ in weights]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            cost = self._cost(padded[begin:end])
            rank = int(np.where(taken < room, (loads + cost) / shares, np.inf).argmin())
            loads[rank] += cost
            taken[rank] += 1
            dealt[rank].append(order[begin:end])
        return float((loads / shares).max()), dealt

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths as a micro-batch computes them: rounded up to the multiple, unless packed."""
        return lengths if self.packed else -(-lengths // self.multiple) * self.multiple

    def positions(self, lengths: np.ndarray) -> int:
        """Positions that a micro-batch of samples of these lengths computes, padding counted."""
        if self.packed:
            total = int(lengths.sum())
            return -(-total // self.multiple) * self.multiple
        return len(lengths) * int(self.padded(lengths).max())

    def _cost(self, padded: np.ndarray) -> float:
        """Of one micro-batch; `padded` longest first."""
        if self.packed:
            return (
                self.cost.fixed
                + float(padded.sum())
                + self.cost.square * float((padded.astype(float) ** 2).sum())
            )
        longest = float(padded[0])
        return self.cost.fixed + len(padded) * longest * (1.0 + self.cost.square * longest)

    def _ends(self, padded: np.ndarray) -> list[int]:
        """Where micro-batches of the sorted samples end: of all contiguous cuts within the limits,
        the cheapest.

        best[j] = min over i of best[i] + cost(i, j), where samples i to j - 1 form the last
        micro-batch. With samples longest first its cost is fixed + (j - i) * w_i: the Monge
        condition cost(i, j) + cost(i', j') <= cost(i, j') + cost(i', j) holds for i < i' < j < j',
        so the best i never moves back as j grows (Yao 1980), which is what makes this fast: each j
        looks only from the last one's best on.
        """
        size = len(padded)
        limit = min(self.micro_batch_size or size, size)
        if self.max_tokens is None and size % limit == 0:
            return list(range(limit, size + 1, limit))  # the fewest are all full
        if self.packed:
            return _first_fit(padded, limit, self.max_tokens)
        tokens = padded.astype(float)
        # Without a token budget the number of micro-batches is what B makes it: one more costs more
        # than any padding.
        fixed = (
            self.cost.fixed
            if self.max_tokens is not None
            else 1.0 + float(tokens.sum() * tokens[0] * size)
        )
        of_sample = tokens * (1.0 + self.cost.square * tokens)
        most = [limit] * size
        if self.max_tokens is not None:
            most = np.clip(self.max_tokens // padded, 1, limit).tolist()
        best, came_from = np.zeros(size + 1), [0] * (size + 1)
        down = np.arange(size, -1, -1)
        first = 0
        for j in range(1, size + 1):
            while first + most[first] < j:
                first += 1
            # down[size - n :] is n, n - 1, ...: the samples of the last micro-batch, for each place
            # it may begin.
            totals = best[first:j] + of_sample[first:j] * down[size - (j - first) : size]
            least = int(totals.argmin())
            best[j], first = totals[least] + fixed, first + least
            came_from[j] = first
        ends = [size]
        while came_from[ends[-1]]:
            ends.append(came_from[ends[-1]])
        return ends[::-1]

    def _split_to_multiple(
        self, padded: np.ndarray, ends: list[int], world_size: int, at_least: int = 0
    ) -> list[int]:
        """Split the costliest micro-batches in two until their number is a multiple, where there
        are samples for it.

        With equal counts a rank that is short would run an empty micro-batch, which costs as much
        as a full one.
        """
        wanted = -(-max(len(ends), at_least) // world_size) * world_size
        if wanted == len(ends):
            return ends
        divisible = [(-self._cost(padded[a:b]), a, b) for a, b in pairwise([0, *ends]) if b - a > 1]
        heapq.heapify(divisible)
        found = list(ends)
        while len(found) < wanted and divisible:
            _, a, b = heapq.heappop(divisible)
            middle = (a + b + 1) // 2
            found.append(middle)
            for begin, end in ((a, middle), (middle, b)):
                if end - begin > 1:
                    heapq.heappush(divisible, (-self._cost(padded[begin:end]), begin, end))
        return sorted(found)

    def _deal_in_steps(
        self, order: np.ndarray, padded: np.ndarray, weights: Sequence[float]
    ) -> Dealt:
        """Equal counts with unequal shares: in each step every rank takes samples in proportion to
        its weight."""
        dealt: Dealt = [[] for _ in weights]
        at, ranks = 0, list(range(len(weights)))
        while at < len(order):
            largest = self.micro_batch_size or len(order)
            if self.max_tokens is not None:
                largest = max(1, min(largest, self.max_tokens // int(padded[at])))
            for rank in ranks:
                taken = max(1, round(largest * weights[rank] / max(weights)))
                if at < len(order):
                    dealt[rank].append(order[at : at + taken])
                    at += taken
            ranks.reverse()  # else the first would always have the longest samples
        return dealt


def cut_window(lengths: np.ndarray, micro_batch_size: int, world_size: int) -> Dealt:
    """`Cut(micro_batch_size).assign_to_ranks(lengths, world_size)`: the fewest micro-batches of at
    most B samples, dealt evenly."""
    return Cut(micro_batch_size).assign_to_ranks(lengths, world_size)


def _first_fit(lengths: np.ndarray, limit: int, max_tokens: int | None) -> list[int]:
    """Ends of contiguous groups filled up to the limits: without padding the fewest micro-batches
    are the cheapest."""
    ends, samples, tokens = [], 0, 0
    for position, length in enumerate(lengths.tolist()):
        if samples and (
            samples == limit or (max_tokens is not None and tokens + length > max_tokens)
        ):
            ends.append(position)
            samples = tokens = 0
        samples, tokens = samples + 1, tokens + length
    return [*ends, len(lengths)]
