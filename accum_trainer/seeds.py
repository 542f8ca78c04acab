"""Where every seed of the package comes from.

torch's CPU generator (mt19937) takes the low 32 bits of its seed and no more: `seed << 32` is one
stream for all seeds, `seed + rank` makes rank 1 of seed 0 rank 0 of seed 1. Here each number is
mixed into all bits. Two things are seeded elsewhere: the global order, whose numbers are a
contract (`window_plan.global_order`), and initial weights, so that `torch.manual_seed(seed)` makes
the same model anywhere. Knows nothing of torch.
"""

from __future__ import annotations

import zlib

import numpy as np


def seed_of(
    purpose: str, seed: int, *, epoch: int = 0, rank: int = 0, shard: int = 0, position: int = 0
) -> int:
    """A seed for one use: 64 bits, of which the low 32 alone tell all arguments apart (but for
    chance, 2**-32).

    numpy's SeedSequence mixes; its output is frozen by NEP 19, so that a run can be continued
    years later.

    Args:
        purpose: what is drawn; uses with different names do not share a stream.
        seed: of the run.
        epoch, rank, shard, position: where; the low 64 bits of each count.
    """
    words = [zlib.crc32(purpose.encode())]
    for value in (seed, epoch, rank, shard, position):
        words += [value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return high << 32 | low
