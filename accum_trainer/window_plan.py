"""The global order of samples, and the cut of one window into micro-batches.

A window is the set of samples of one optimizer update. Which samples those are depends on (seed, epoch, B_eff) alone;
how they are cut and dealt to processes is free, because the gradient is a sum over the window. This module decides
both and knows nothing of tensors, devices or engines.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# window[rank][step] -> positions of that micro-batch's samples inside the window
Cut = list[list[np.ndarray]]


def global_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(num_samples)`, shape (num_samples,), int64, from (seed, epoch) alone.

    RandomState, not Generator: its stream is frozen by numpy's NEP 19, so that a run continued years later under
    another numpy still sees the same windows.
    """
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(num_samples).astype(np.int64)


def windows_of(order: np.ndarray, global_batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yield the windows of an epoch from sample `start` on: slices of `global_batch_size`, the last may be short."""
    for begin in range(start, len(order), global_batch_size):
        yield order[begin : begin + global_batch_size]


def cut_window(lengths: np.ndarray, micro_batch_size: int, world_size: int) -> Cut:
    """Cut a window into micro-batches of at most `micro_batch_size` samples and deal them to `world_size` ranks.

    Sorted by length, so that neighbours need little padding; longest micro-batch first, so that a process that runs
    out of memory does so at once; each to the rank with the least padded tokens so far that has room, no rank taking
    more than ceil(micro-batches / ranks). A rank may come away with none. Any cut gives the same gradient; this one is cheap.

    Args:
        lengths: tokens of each sample of the window, shape (samples,). All equal keeps the samples in their order.
        micro_batch_size: B, most samples in one micro-batch.
        world_size: W, ranks to deal to.

    Returns:
        `cut[rank][step]`: positions within the window, each position exactly once.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    micro_batches = [
        longest_first[begin : begin + micro_batch_size] for begin in range(0, len(lengths), micro_batch_size)
    ]
    room = -(-len(micro_batches) // world_size)
    cut: Cut = [[] for _ in range(world_size)]
    load = [0] * world_size
    for micro_batch in micro_batches:
        rank = min((r for r in range(world_size) if len(cut[r]) < room), key=lambda r: (load[r], r))
        cut[rank].append(micro_batch)
        load[rank] += len(micro_batch) * int(lengths[micro_batch[0]])
    return cut
