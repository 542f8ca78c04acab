"""The global order of samples, and the cut of one window into micro-batches.

A window is the set of samples of one optimizer update. Which samples those are depends on (seed,
epoch, B_eff) alone; how they are cut and dealt to processes is free, because the gradient is a sum
over the window. This module decides both and knows nothing of tensors, devices or engines.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from accum_trainer.packed_parts import even_parts, fewest_parts, parts_by_share

# (begin, end) of a micro-batch in the sorted window -> its cost
Costs = Callable[[int, int], float]
# Micro-batches of a window in the order in which they are dealt: the cost of each, and its samples
# in the sorted window
Priced = tuple[list[float], Sequence[slice | np.ndarray]]
# window[rank][step] -> positions of that micro-batch's samples inside the window
Dealt = list[list[np.ndarray]]
# Micro-batches of a window whose noise is measured, over all ranks.
_LEAST_PARTS = 4


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
    """How windows are cut into micro-batches and dealt to ranks. Any cut gives the same gradient,
    but for a router's loss, which is by definition a mean over micro-batches.

    Attributes:
        micro_batch_size: B, most samples of a micro-batch; None for no limit. Without `max_tokens`
            a window becomes the fewest micro-batches that B allows, with the least padding.
            Packed, B is an amount of memory: a micro-batch may have as many tokens as the B
            longest samples of its window, so that more of the short ones share it. With equal
            counts and shares of the ranks it stays a number of samples.
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

        Padded, neighbours in length share a micro-batch, longest first, so that a process that runs
        out of memory does so at once; packed, the parts are equal (`packed_parts`). Each goes to
        the rank with the least cost for its share so far. A rank may come away with none.

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
        if self.packed and self.rank_weights is not None:
            parts = parts_by_share(padded, weights, self._budget(padded))
            return [[order[part] for part in rank] for rank in parts]
        cuts = (self._packed_cuts if self.packed else self._padded_cuts)(padded, world_size)
        _, ranks, (_, samples) = min(
            ((*self._dealt(cut[0], weights), cut) for cut in cuts), key=lambda found: found[0]
        )
        dealt: Dealt = [[] for _ in weights]
        for rank, taken in zip(ranks, samples, strict=True):
            dealt[rank].append(order[taken])
        return dealt

    def _padded_cuts(self, padded: np.ndarray, world_size: int) -> list[Priced]:
        """Contiguous cuts to choose from: neighbours need the least padding."""
        ends, costs = self._ends(padded), self._costs(padded)
        cuts = [ends]
        if self.equal_counts:
            cuts = [_split_to_multiple(costs, ends, world_size)]
        elif self.max_tokens is not None and world_size > 1:
            # A few micro-batches more may be what lets the ranks end together. Without a token
            # budget, K micro-batches of B are what was asked for.
            for more in range(3):
                at_least = len(ends) + more * world_size
                cuts.append(_split_to_multiple(costs, cuts[-1], world_size, at_least))
        # Cuts are equal if no sample is left to split; such a cut is dealt once.
        different = [cut for i, cut in enumerate(cuts) if cut not in cuts[:i]]
        between = [list(pairwise([0, *cut])) for cut in different]
        return [([costs(*one) for one in cut], [slice(*one) for one in cut]) for cut in between]

    def _packed_cuts(self, tokens: np.ndarray, world_size: int) -> list[Priced]:
        """Cuts into equal parts to choose from: the fewest that give every rank as many and,
        unless counts must be equal, one more for each rank."""
        budget = self._budget(tokens)
        fewest = fewest_parts(tokens, budget)
        if world_size == 1:
            return [self._priced(tokens, fewest)]
        least = -(-(int(fewest.max()) + 1) // world_size) * world_size
        counts = range(least, len(tokens) + world_size, world_size)  # the last: each sample alone
        even = (part for n in counts if (part := even_parts(tokens, n, budget)) is not None)
        return [self._priced(tokens, cut) for cut in islice(even, 1 if self.equal_counts else 2)]

    def _budget(self, tokens: np.ndarray) -> int:
        """Most tokens of a packed micro-batch, of samples that come longest first."""
        longest = int(tokens[: self.micro_batch_size].sum())
        return longest if self.max_tokens is None else min(longest, self.max_tokens)

    def _priced(self, tokens: np.ndarray, part_of: np.ndarray) -> Priced:
        squares = np.bincount(part_of, weights=tokens.astype(float) ** 2)
        costs = self.cost.fixed + np.bincount(part_of, weights=tokens) + self.cost.square * squares
        by_part = np.argsort(part_of, kind="stable")
        samples = np.split(by_part, np.cumsum(np.bincount(part_of))[:-1])
        order = np.argsort(-costs, kind="stable").tolist()
        return costs[order].tolist(), [samples[part] for part in order]

    def assign_at_random(self, lengths: np.ndarray, world_size: int) -> Dealt | None:
        """Cut a window whose order is random so that each micro-batch is a random sample, too, to
        measure the noise of the gradient; None if it has too few samples.

        Sizes do not depend on which samples fall where, else short micro-batches would be those of
        long samples. At least `_LEAST_PARTS` micro-batches in all, as few as B and `max_tokens`
        allow. On several ranks the last of each is one sample: engines exchange gradients in its
        backward, so that its own norm is not known, and the smaller it is, the less is lost.
        """
        weights = np.array(self.rank_weights or (1.0,) * world_size, dtype=float)
        ends = np.rint(np.cumsum(weights) / weights.sum() * len(lengths)).astype(int)
        shares = np.split(np.arange(len(lengths)), ends[:-1])
        largest = min(self.micro_batch_size or len(lengths), len(lengths))
        if self.max_tokens is not None:
            largest = min(largest, max(1, self.max_tokens // int(self.padded(lengths).max())))
        last = int(world_size > 1)
        parts = -(-_LEAST_PARTS // world_size)
        counts = [max(parts, -(-(len(share) - last) // largest)) for share in shares]
        if self.equal_counts:
            counts = [max(counts)] * world_size
        if any(len(share) < count + last for share, count in zip(shares, counts, strict=True)):
            return None
        return [
            np.array_split(share[: len(share) - last], count) + [share[len(share) - last :]] * last
            for share, count in zip(shares, counts, strict=True)
        ]

    def _dealt(self, priced: list[float], weights: Sequence[float]) -> tuple[float, list[int]]:
        """Each micro-batch to the rank that would be done with it first; the time of the last rank,
        and the rank of each.

        Longest processing time first (Graham 1969). Where B decides the count, no rank takes more
        than its part of it.
        """
        shares = np.array(weights, dtype=float)
        counted = (self.max_tokens is None and not self.packed) or self.equal_counts
        room = (
            np.ceil(len(priced) * shares / shares.sum() - 1e-9)
            if counted
            else np.full(len(shares), np.inf)
        )
        if len(set(weights)) == 1:
            return _dealt_evenly(priced, len(shares), float(room[0]))
        loads, taken, ranks = np.zeros(len(shares)), np.zeros(len(shares)), []
        for cost in priced:
            rank = int(np.where(taken < room, (loads + cost) / shares, np.inf).argmin())
            loads[rank] += cost
            taken[rank] += 1
            ranks.append(rank)
        return float((loads / shares).max()), ranks

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths as a micro-batch computes them: rounded up to the multiple, unless packed."""
        multiple = 1 if self.packed else self.multiple
        found: np.ndarray = -(-lengths // multiple) * multiple
        return np.maximum(found, 1) if self.packed else found  # one without tokens counts as one

    def positions(self, lengths: np.ndarray) -> int:
        """Positions that a micro-batch of samples of these lengths computes, padding counted."""
        if self.packed:
            total = int(lengths.sum())
            return -(-total // self.multiple) * self.multiple
        return len(lengths) * int(self.padded(lengths).max())

    def _costs(self, padded: np.ndarray) -> Costs:
        """Prices of micro-batches of these samples, longest first."""
        fixed, square = self.cost.fixed, self.cost.square
        longest = padded.tolist()
        return lambda a, b: fixed + (b - a) * longest[a] * (1.0 + square * longest[a])

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


def _split_to_multiple(
    costs: Costs, ends: list[int], world_size: int, at_least: int = 0
) -> list[int]:
    """Split the costliest micro-batches in two until their number is a multiple, where there are
    samples for it.

    With equal counts a rank that is short would run an empty micro-batch, which costs as much as a
    full one.
    """
    wanted = -(-max(len(ends), at_least) // world_size) * world_size
    if wanted == len(ends):
        return ends
    divisible = [(-costs(a, b), a, b) for a, b in pairwise([0, *ends]) if b - a > 1]
    heapq.heapify(divisible)
    found = list(ends)
    while len(found) < wanted and divisible:
        _, a, b = heapq.heappop(divisible)
        middle = (a + b + 1) // 2
        found.append(middle)
        for begin, end in ((a, middle), (middle, b)):
            if end - begin > 1:
                heapq.heappush(divisible, (-costs(begin, end), begin, end))
    return sorted(found)


def _dealt_evenly(priced: list[float], world_size: int, room: float) -> tuple[float, list[int]]:
    """As `Cut._dealt` with equal shares, at most `room` micro-batches to a rank. The least loaded
    rank comes from a heap: a look at each of 1,024 takes longer than all else of the plan."""
    loads = [(0.0, rank) for rank in range(world_size)]
    ranks, taken, last = [], [0] * world_size, 0.0
    for cost in priced:
        load, rank = loads[0]
        taken[rank] += 1
        if taken[rank] < room:
            heapq.heapreplace(loads, (load + cost, rank))
        else:
            heapq.heappop(loads)
        ranks.append(rank)
        last = max(last, load + cost)
    return last, ranks
