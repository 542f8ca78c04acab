"""`SourceOptions`: how a source of windows is read.

`Accumulator.windows` builds one from its arguments and from the engine's answers about the source.
Reads nothing and checks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accum_trainer.batch import Batch
from accum_trainer.window_plan import Cut

# Samples to one batch.
Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True, eq=False)
class SourceOptions:
    """How a source is read. Options up to `pin_memory` apply to data sets, except for `seed`
    and `noise_every`.

    Attributes:
        collate_fn: samples to one batch; None for torch's default.
        lengths: tokens of each sample, shape (samples,), which let the cut avoid padding. None to
            use those that the data set has (`lengths.find_lengths`).
        shuffle: False keeps the data set's own order.
        seed: of the global order; also of whatever a DataLoader without a generator draws.
        shard: (i, n), every n-th sample of the order from the i-th on. The n shards together hold
            each sample exactly once.
        cut: how windows become micro-batches; None to split them by B.
        num_workers: processes that load samples.
        prefetch: make each window in a thread while the previous one is trained on. The data set's
            `__getitem__` must not use the global random generators.
        noise_every: every N-th window is cut at random, so that the noise of the gradient can be
            measured; 0 for none.
        pin_memory: copy batches to page-locked memory.
        already_sharded: a DataLoader yields this rank's batches only.
        read_together: each batch that is read takes a collective of all ranks.
    """

    collate_fn: Collate | None = None
    lengths: np.ndarray | None = None
    shuffle: bool = True
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    cut: Cut | None = None
    num_workers: int = 0
    prefetch: bool = False
    noise_every: int = 0
    pin_memory: bool = False
    already_sharded: bool = False
    read_together: bool = False
