"""A window cut for packing: samples that lie end to end need no padding, so any sample may go into
any micro-batch, and micro-batches can be made equal.

Each sample, longest first, goes to the micro-batch that has the fewest tokens so far (Graham 1969,
longest processing time first): the largest then exceeds the mean by less than the sample it got
last, and late samples are short. Knows lengths only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def fewest_parts(tokens: np.ndarray, budget: int) -> np.ndarray:
    """The part of each sample, shape (samples,): as few parts as were found to hold at most
    `budget` tokens each. A longer sample has its own.

    Args:
        tokens: of each sample, longest first, shape (samples,).
    """
    alone = tokens > budget
    least = int(alone.sum()) - (-int(tokens[~alone].sum()) // budget)
    found = even_parts(tokens, least, budget)
    if found is None:
        filled = _filled_in_turn(tokens, budget)
        found = even_parts(tokens, int(filled[-1]) + 1, budget)
        found = filled if found is None else found
    return found


def even_parts(tokens: np.ndarray, count: int, budget: int) -> np.ndarray | None:
    """The part of each sample, shape (samples,), for `count` parts of about as many tokens; None if
    a part of several samples has more than `budget`.

    Args:
        tokens: of each sample, longest first, shape (samples,). All equal keeps neighbours
            together.
    """
    count = min(count, len(tokens))
    if tokens[0] == tokens[-1]:
        found = np.arange(len(tokens)) * count // len(tokens)
    else:
        loads, found = [(0, part) for part in range(count)], np.empty(len(tokens), dtype=np.int64)
        for sample, length in enumerate(tokens.tolist()):
            load, part = loads[0]
            found[sample] = part
            heapq.heapreplace(loads, (load + length, part))
    sizes, members = np.bincount(found, weights=tokens), np.bincount(found)
    return None if (sizes[members > 1] > budget).any() else found


def parts_by_share(
    tokens: np.ndarray, shares: Sequence[float], budget: int
) -> list[list[np.ndarray]]:
    """The samples of each part of each rank: every rank has tokens in proportion to its share, in
    the fewest parts of at most `budget`, the largest first.

    Args:
        tokens: of each sample, longest first, shape (samples,).
    """
    loads = np.zeros(len(shares))
    by_rank: list[list[int]] = [[] for _ in shares]
    of_share = 1 / np.array(shares)
    for sample, length in enumerate(tokens.tolist()):
        rank = int(((loads + length) * of_share).argmin())  # who would be done with it first
        loads[rank] += length
        by_rank[rank].append(sample)
    found = []
    for samples in map(np.array, by_rank):
        part_of = fewest_parts(tokens[samples], budget) if len(samples) else samples
        parts = [samples[part_of == part] for part in range(len({*part_of.tolist()}))]
        found.append(sorted(parts, key=lambda part: -int(tokens[part].sum())))
    return found


def _filled_in_turn(tokens: np.ndarray, budget: int) -> np.ndarray:
    """Each part takes the next samples until the following one does not fit."""
    found, part, load = np.empty(len(tokens), dtype=np.int64), 0, 0
    for sample, length in enumerate(tokens.tolist()):
        if load and load + length > budget:
            part, load = part + 1, 0
        found[sample] = part
        load += length
    return found
