"""The source of every seed in the package.

torch's CPU generator (mt19937) uses only the low 32 bits of its seed: `seed << 32` gives the same
stream for all seeds, and with `seed + rank`, rank 1 of seed 0 equals rank 0 of seed 1. Here each
number is mixed into all bits. Two things are seeded elsewhere: the global order, whose numbers are
a contract (`window_plan.global_order`), and initial weights, so that `torch.manual_seed(seed)`
gives the same model everywhere. Does not use torch.
"""

from __future__ import annotations

import zlib

import numpy as np


def seed_of(
    purpose: str, seed: int, *, epoch: int = 0, rank: int = 0, shard: int = 0, position: int = 0
) -> int:
    """A 64-bit seed for one use; its low 32 bits alone depend on every argument.

    Two uses collide there by chance only, 2**-32. numpy's SeedSequence mixes; NEP 19 freezes its
    output, so that a run can be continued years later.

    Args:
        purpose: names the use; different names do not share a stream.
        seed: of the run.
        epoch, rank, shard, position: of the use; the low 64 bits of each count.
    """
    words = [zlib.crc32(purpose.encode())]
    for value in (seed, epoch, rank, shard, position):
        words += [value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return int(high << 32 | low)
