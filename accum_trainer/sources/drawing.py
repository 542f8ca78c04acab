"""Random numbers that reading draws: each batch from seeds of its own, and training's stream is
left alone.

Data that augments draws from the global generators of Python, numpy and torch, in whatever process
reads it. Here a batch carries its seed to that process, so that what it draws depends on the batch
and not on the worker that reads it, on what this worker read before, or on where a run was resumed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class SeededIndices(list[Any]):
    """The sample indices of one batch: a process that begins to read them seeds its global
    generators.

    A list to everybody else. It must not seed the process that only passes it on: `__reduce__`
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
    """Let what runs inside draw from generators of `seed`; training's streams go on afterwards as
    if nothing was drawn."""
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
    np.random.seed(
        [seed & 0xFFFFFFFF, seed >> 32, 1]
    )  # of the same two words Python's own would be the same stream
    torch.default_generator.manual_seed(seed)  # not the device's: data is read on the CPU
