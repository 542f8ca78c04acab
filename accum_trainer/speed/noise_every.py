"""How often the noise of the gradient is measured, so that it costs less than 1 % of the time.

A window that is cut at random pads more and may have more micro-batches, and after each of them the
gradient is read and copied. Knows lengths, cuts and their cost; no model.
"""

from __future__ import annotations

import math

import numpy as np

from accum_trainer.window_plan import Cut, Dealt

# Of all time, with room for what the model of cost does not know.
_SHARE = 0.005
# The cost of reading and copying a gradient, as a part of a micro-batch's cost beside its tokens
# (`Cost.fixed`): 8 tokens on a CPU, 500 on a GPU.
_READING = 0.25
# Windows that are tried.
_TRIED = 32


def affordable_noise_every(cut: Cut, lengths: np.ndarray, size: int, world_size: int) -> int:
    """The smallest number of windows of which one may be measured; 0 if none can be.

    Args:
        lengths: tokens of each sample, shape (samples,), int64.
        size: samples of a window.
    """
    order = np.random.RandomState(0).permutation(len(lengths))
    ordinary = measured = 0.0
    for begin in range(0, min(len(order) - size + 1, _TRIED * size), size):
        window = lengths[order[begin : begin + size]]
        at_random = cut.assign_at_random(window, world_size)
        if at_random is None:
            return 0
        ordinary += _seconds(cut, window, cut.assign_to_ranks(window, world_size), 0.0)
        measured += _seconds(cut, window, at_random, _READING * cut.cost.fixed)
    if not ordinary:
        return 0
    return max(1, math.ceil((measured / ordinary - 1) / _SHARE))


def _seconds(cut: Cut, lengths: np.ndarray, dealt: Dealt, reading: float) -> float:
    """Cost of the rank that ends last, in tokens, with `reading` after all micro-batches of a rank
    but its last."""
    return max(
        sum(_cost(cut, lengths[batch]) for batch in own) + reading * max(0, len(own) - 1)
        for own in dealt
    )


def _cost(cut: Cut, lengths: np.ndarray) -> float:
    squares = (
        float((lengths.astype(float) ** 2).sum())
        if cut.packed
        else len(lengths) * float(cut.padded(lengths).max()) ** 2
    )
    return cut.cost.fixed + cut.positions(lengths) + cut.cost.square * squares
