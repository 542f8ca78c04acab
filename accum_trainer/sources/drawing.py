"""Seeds of the random numbers that reading draws; training's random stream stays untouched.

Augmenting data draws from the global generators of Python, numpy and torch, in the process that
reads it. Here a batch carries its seed to that process. Its numbers then do not depend on the
worker that reads it, on earlier reads of that worker, or on where a run was resumed. Knows no
source.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class SeededIndices(list[Any]):
    """The sample indices of one batch; iterating seeds the global generators of the process.

    Otherwise a plain list. A process that only passes it on must not be seeded: `__reduce__`
    pickles without iterating.
    """

    def __init__(self, indices: Sequence[Any], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        _seed_generators(self.seed)
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededIndices, (self[:], self.seed)


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the global generators inside; afterwards they continue as if nothing was drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_generators(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    # A third word, since Python's generator would give the same stream from the same two.
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32, 1])
    torch.default_generator.manual_seed(seed)  # not the device's: data is read on the CPU
