"""How noisy a loss curve is, whatever its slope: variance around the trend, and spikes.

Knows arrays only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Updates below which no variance is given, and half of the updates of a running median.
FEWEST = 10
_HALF_WINDOW = 12
_SPIKE = 6.0
# Rows of windows that are sorted at once: memory is bounded for any length.
_AT_ONCE = 1 << 16
_Z_95 = 1.96
_NORMAL_MAD = 1.4826  # standard deviation / median absolute deviation, of a normal distribution


@dataclass(frozen=True)
class Variance:
    """The variance of a loss around its trend.

    Attributes:
        value: squared unit of the loss; that of the noise of one update.
        log_error: standard error of its logarithm.
        updates: on which it was measured.
    """

    value: float
    log_error: float
    updates: int

    @property
    def log_interval(self) -> tuple[float, float]:
        """How far below and above the logarithm of `value` its 95 % interval reaches.

        That of a mean of nu = 2 / log_error^2 squares, which is chi-squared (Satterthwaite 1946),
        by its cube root (Wilson and Hilferty 1931). It reaches further up than down: few squares
        give too small a variance more easily than too large a one.
        """
        if self.log_error == 0:
            return 0.0, 0.0
        error = self.log_error**2 / 9  # of the cube root, squared
        high, low = (
            -3 * math.log(max(0.1, 1 - error - sign * _Z_95 * math.sqrt(error))) for sign in (1, -1)
        )
        return -low, high


def variance_around_trend(x: np.ndarray, loss: np.ndarray) -> Variance | None:
    """The variance of a loss curve around its own trend.

    Each loss is compared with the straight line through its two neighbours. At the places x_i,
    which need not be equally far apart,

        e_i = a_i L_(i-1) + (1 - a_i) L_(i+1) - L_i,   a_i = (x_(i+1) - x_i) / (x_(i+1) - x_(i-1))
        variance = mean over i of  e_i^2 / (a_i^2 + (1 - a_i)^2 + 1)

    If the losses are a trend plus independent noise, its expectation is the variance of the noise
    plus the mean square of what the trend bends between three neighbours. A slope of any size adds
    nothing: a run that learns more per update, as one of a larger batch does, is not charged for
    it, and neither is a long run. Nothing is fitted and no width is chosen (Gasser, Sroka and
    Jennen-Steinmetz, Biometrika 73, 1986).

    The standard error uses the squares' own spread and the correlation of those that share losses,
    up to two apart. It is at least that of normal noise, since a few squares show too little of
    their spread. Of noise with a longer tail than that, 30 updates show too little still.

    Args:
        x: places on any axis, increasing, shape [n]; its unit does not matter.
        loss: shape [n].

    Returns:
        None with fewer than ten losses.
    """
    if len(loss) < FEWEST:
        return None
    x, loss = x.astype(np.float64), loss.astype(np.float64)
    span = x[2:] - x[:-2]
    # Places may coincide, of updates that took no time.
    weight = np.divide(x[2:] - x[1:-1], span, out=np.full(len(span), 0.5), where=span > 0)
    residual = weight * loss[:-2] + (1 - weight) * loss[2:] - loss[1:-1]
    squares = residual**2 / (weight**2 + (1 - weight) ** 2 + 1)
    value = float(squares.mean())
    return Variance(value, _log_error(squares, value), len(loss))


def _log_error(squares: np.ndarray, mean: float) -> float:
    apart = squares - mean
    count = len(squares)
    spread = float((apart @ apart + 2 * sum(apart[k:] @ apart[:-k] for k in (1, 2))) / count)
    # Of normal noise, whose residuals correlate by -2/3 and 1/6 with those one and two further on.
    normal = 2 * mean**2 * (1 + 2 * (4 / 9 + 1 / 36)) / count
    return math.sqrt(max(spread / count, normal)) / mean if mean > 0 else 0.0


@dataclass(frozen=True)
class Spike:
    """A loss that left its trend upwards.

    Attributes:
        place: index of its highest update.
        height: above the trend there.
        updates: how many in a row were above the limit.
    """

    place: int
    height: float
    updates: int


def find_spikes(loss: np.ndarray) -> list[Spike]:
    """Where a loss jumps above its trend by more than its noise explains.

    The trend is the running median of 25 losses, fewer at the ends. An update is in a spike if it
    lies above it by more than six times the noise: 1.4826 times the median absolute distance from
    the trend, within a window of 25 updates or in the whole run, whichever is larger. Updates in a
    row are one spike. A loss that rises for longer than twelve updates is a new trend, no spike.
    """
    if len(loss) < FEWEST:
        return []
    above = loss - running_median(loss)
    size = np.abs(above)
    noise = _NORMAL_MAD * np.maximum(running_median(size), np.median(size))
    # The rounding of equal losses is no spike.
    is_high = above > np.maximum(_SPIKE * noise, 1e-6 * np.abs(loss))
    edges = np.flatnonzero(np.diff(is_high, prepend=False, append=False))
    found = []
    for first, end in edges.reshape(-1, 2).tolist():
        place = first + int(np.argmax(above[first:end]))
        found.append(Spike(place, float(above[place]), end - first))
    return found


def running_median(numbers: np.ndarray) -> np.ndarray:
    """The median of each number and its twelve neighbours on both sides; at the ends of as many as
    there are on both."""
    half = min(_HALF_WINDOW, (len(numbers) - 1) // 2)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, 2 * half + 1)
    result = numbers.astype(np.float64)
    for first in range(0, len(windows), _AT_ONCE):
        rows = windows[first : first + _AT_ONCE]
        result[half + first : half + first + len(rows)] = np.median(rows, axis=1)
    for near in range(1, half):
        result[near] = np.median(numbers[: 2 * near + 1])
        result[-1 - near] = np.median(numbers[-1 - 2 * near :])
    return result


def running_mean(numbers: np.ndarray, half: int) -> np.ndarray:
    """The mean of each number and its `half` neighbours on both sides; at the ends of as many as
    there are on both, but of at least a quarter of `half` on the side that has them: a single
    number there would look like a spike of the trend."""
    count = len(numbers)
    places = np.arange(count)
    reach = np.minimum(np.minimum(places, count - 1 - places), half)
    reach = np.maximum(reach, half // 4)
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(numbers - numbers.mean())])
    return (sums[end] - sums[first]) / (end - first) + numbers.mean()
