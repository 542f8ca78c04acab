"""The noise of the gradient: how large a batch the model wants now, from windows cut at random.

Let G be the gradient of one sample's loss, summed over its targets. A window cut at random gives
norms of independent sums of n samples each, and one of all of them:

    E |sum of n G|^2 = n^2 |mu|^2 + n tr(Sigma),    mu = E G, Sigma = Cov G.

Two unknowns, fitted in each measured window and smoothed apart over windows (McCandlish et al.
2018, arXiv:1812.06162, appendix A). Their ratio tr(Sigma) / |mu|^2 is the noise scale, in samples:
at that effective batch the noise of an update is as large as its gradient. It is an estimate of the
batch beyond which more samples per update save few updates; Merrill et al. 2025, arXiv:2505.23971,
show where it and the batch that loses nothing part, which only training branches can measure
(`accum-trainer sweep`).

The unit is the sample, a row of the data. A window's gradient is a sum over samples divided by its
targets, so a sample with more targets than the mean, but the same gradient per target, adds no
noise. Its part of tr(Sigma), Var(targets) / (mean targets)^2 samples, is subtracted. Exact if a
sample's gradient per target is independent of its number of targets; else off by their
correlation, at most a few samples.

Knows gradients as tensors and counts; no data, no engine's ways, no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from accum_trainer.batch import num_samples as samples_in
from accum_trainer.engine.memory import free_bytes

# Of an interval: 95 %.
_NORMAL_QUANTILE = 1.96
# Measured windows without which nothing is said.
_LEAST_WINDOWS = 4
# Numbers of a rank in the exchange that ends a window.
_ROW = 8
# Measured windows beyond which old ones are forgotten, so that the estimate follows training.
_MOST_WINDOWS = 1000
# Window i of m has weight (i / m) to this power.
_FORGETTING = 3


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the noise scale, in samples.

    Attributes:
        samples: tr(Sigma) / |mu|^2; None while the interval has no upper end: the gradient does
            not stand out of the noise yet.
        low, high: ends of the 95 % interval (Fieller 1954); None if unknown.
        num_windows: measured windows.
    """

    samples: float | None = None
    low: float | None = None
    high: float | None = None
    num_windows: int = 0


class Fit(NamedTuple):
    """The fit of one window, in units of the gradient of a sample's summed loss.

    Attributes:
        signal: |mu|^2, unbiased, so it may be negative.
        noise: tr(Sigma), unbiased.
        targets: mean targets of a sample.
        targets_variance: of a sample's number of targets.
    """

    signal: float
    noise: float
    targets: float
    targets_variance: float


class GradientNoise:
    """Fits of measured windows, smoothed. Window i of m has weight (i / m)^3, up to
    `_MOST_WINDOWS`: the last half of a run counts fifteen times the first. With equal weights, or
    i / m, early windows, whose |mu|^2 is larger, would halve the ratio while the loss falls fast;
    a higher power would widen the interval for little.

    Attributes:
        obstacle: why the last window that was to be measured was not; "" if it was.
    """

    def __init__(self) -> None:
        self.obstacle = ""
        self.num_windows = 0
        # Sums over windows: of weights w, w * fit, w^2, w^2 * fit and w^2 * (products of signal
        # and noise).
        self._sums = np.zeros(13)

    def add(self, fit: Fit) -> None:
        """Take one more window."""
        self.obstacle = ""
        self.num_windows += 1
        keep = (1 - 1 / min(self.num_windows, _MOST_WINDOWS)) ** _FORGETTING
        self._sums *= [keep] * 5 + [keep**2] * 8
        a, b = fit.signal, fit.noise
        self._sums += [1.0, *fit, 1.0, *fit, a * a, a * b, b * b]

    @property
    def estimate(self) -> NoiseScale:
        """The noise scale as of the windows so far."""
        if self.num_windows < _LEAST_WINDOWS:
            return NoiseScale(num_windows=self.num_windows)
        total, *sums = self._sums[:5]
        squares, sa, sb, _, _, saa, sab, sbb = self._sums[5:]
        a, b, targets, variance = (value / total for value in sums)
        # Of weighted means: sum of w^2 (x - mean)(y - mean) / (sum of w)^2, with Bessel's factor.
        effective = total**2 / squares
        scale = effective / (effective - 1) / total**2
        var_a = scale * (saa - 2 * a * sa + a * a * squares)
        var_b = scale * (sbb - 2 * b * sb + b * b * squares)
        cov = scale * (sab - a * sb - b * sa + a * b * squares)
        # Student's t by its expansion around the normal quantile.
        t = _NORMAL_QUANTILE + (_NORMAL_QUANTILE**3 + _NORMAL_QUANTILE) / (4 * (effective - 1))
        low, high = _fieller(a, b, var_a, var_b, cov, t)
        uneven, ratio = variance / targets**2, math.nan
        if high is not None:
            # A ratio of means is biased; Beale's estimator removes the first order.
            ratio = (b / a + cov / a**2) / (1 + var_a / a**2)
        found = (ratio if high is not None else None, low, high)
        samples, low, high = (None if x is None else max(0.0, float(x - uneven)) for x in found)
        return NoiseScale(samples, low, high, self.num_windows)

    def state_dict(self) -> dict[str, Any]:
        """The sums, as JSON values."""
        return {"num_windows": self.num_windows, "sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.num_windows = int(state["num_windows"])
        self._sums = np.array(state["sums"], dtype=float)


def _fieller(
    a: float, b: float, var_a: float, var_b: float, cov: float, t: float
) -> tuple[float | None, float | None]:
    """Ends of the interval of b / a: all r with (b - r a)^2 <= t^2 Var(b - r a). None for an end
    that does not exist: a is not surely above 0."""
    square = a * a - t * t * var_a
    middle = a * b - t * t * cov
    root = middle * middle - square * (b * b - t * t * var_b)
    if root < 0:
        return None, None  # neither is known: any ratio fits
    if a > 0 and square > 0:
        return (middle - math.sqrt(root)) / square, (middle + math.sqrt(root)) / square
    least = (middle - math.sqrt(root)) / square if square else None
    return (least if least is not None and least > 0 and b > 0 else None), None


class WindowNorms:
    """The norms of one window's micro-batches on this rank, each from the difference of the
    gradient before and after it; that takes a copy of the gradient while the window lasts.

    The last micro-batch is left out: its backward exchanges gradients. The norm of the whole
    window, which every update knows, takes its place.

    Args:
        noise: takes the fit.
        planned: the micro-batches that this rank runs, in order (`window.Planned`); none in a
            window that is not measured.
        gradient_divisor: as of the engine.
    """

    def __init__(
        self,
        noise: GradientNoise,
        planned: Sequence[Any],
        gradient_divisor: float,
    ) -> None:
        self._noise, self._divisor = noise, gradient_divisor
        # (samples, targets) of each; (0, 0) for one of weight 0.
        self._shares = [(samples_in(p.batch) if p.weight else 0, p.num_targets) for p in planned]
        self._before: dict[Any, torch.Tensor] = {}
        self._squares: list[torch.Tensor | float] = []
        self._obstacle = ""
        if any(samples and not targets for samples, targets in self._shares):
            self._obstacle = "a micro-batch has no target"

    @property
    def size(self) -> int:
        """Numbers of `to_row`: the same in every window, so that the exchange that compares the
        ranks' windows does not hang if one rank measures and another does not."""
        return _ROW

    def take(self, engine: Any, models: Sequence[torch.nn.Module]) -> None:
        """After a micro-batch: the square of its gradient's norm. Waits for no device."""
        position, last = len(self._squares), len(self._shares) - 1
        if position >= last or self._obstacle:
            return
        if not self._shares[position][0]:
            self._squares.append(0.0)
            return
        gradients = engine.local_gradients(models)
        self._obstacle = self._obstacle_of(engine, gradients)
        if self._obstacle:
            return
        try:
            self._squares.append(self._square(gradients, is_needed_later=position < last - 1))
        except Exception as error:  # the update itself needs none of this
            if not engine.is_out_of_memory(error):
                raise
            self.give_up()

    def give_up(self) -> bool:
        """Memory ran out: give back the copy of the gradient and measure no more. Whether there
        was one, so that the same micro-batch may fit now."""
        self._obstacle = self._obstacle or "out of memory"
        held = bool(self._before)
        self._before.clear()
        return held

    def _obstacle_of(self, engine: Any, gradients: dict[Any, torch.Tensor]) -> str:
        if not gradients:
            return (
                f"{engine.name} with grad_sync={engine.grad_sync} and mixed_precision="
                f"{engine.mixed_precision} has no gradient of one micro-batch, or several "
                "optimizers share it"
            )
        new = sum(g.nbytes for key, g in gradients.items() if key not in self._before)
        # Half of what is free stays free for the forwards to come.
        if new and 2 * new > (free := free_bytes(engine.device)):
            return f"a copy of the gradient takes {new / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        return ""

    @torch.no_grad()
    def _square(self, gradients: dict[Any, torch.Tensor], is_needed_later: bool) -> torch.Tensor:
        """The square of what `gradients` have grown by since the last call; the first sum has grown
        from zero."""
        norms = []
        for key, gradient in gradients.items():
            before = self._before.get(key)
            grown = gradient if before is None else before.sub_(gradient)
            norms.append(torch.linalg.vector_norm(grown, dtype=torch.float32))
            if not is_needed_later:
                continue
            if before is None:
                self._before[key] = gradient.detach().clone()
            else:
                before.copy_(gradient)
        return torch.stack([norm.to(norms[0].device) for norm in norms]).norm() ** 2

    def to_row(self, num_splits: int) -> list[float | torch.Tensor]:
        """This rank's numbers for the exchange that ends the window; sums over its micro-batches.

        Args:
            num_splits: of micro-batches in this window; split ones are no longer as planned.
        """
        self._before.clear()
        self._obstacle = self._obstacle or ("out of memory" if num_splits else "")
        if self._obstacle or not self._shares:
            return [0.0] * self.size
        known = [
            (square, samples)
            for square, (samples, _) in zip(self._squares, self._shares, strict=False)
            if samples
        ]
        zero: float | torch.Tensor = 0.0
        return [
            1.0,
            sum((square for square, _ in known), zero),
            sum((square / samples for square, samples in known), zero),
            float(sum(samples**2 for _, samples in known)),
            float(sum(samples for _, samples in known)),
            float(len(known)),
            float(sum(targets**2 / samples for samples, targets in self._shares if samples)),
            float(sum(samples > 0 for samples, _ in self._shares)),
        ]

    def learn(
        self, table: np.ndarray, num_samples: int, num_targets: float, grad_norm: float
    ) -> None:
        """Fit every rank's `to_row`, shape (ranks, size), and the norm of the averaged gradient.

        The square of a micro-batch of n samples has the mean x |mu|^2 + y tr(Sigma), x = n^2,
        y = n. So has that of the whole window of N samples without theirs, x = N^2 - sum n^2,
        y = N - sum n. Where noise prevails all these are uncorrelated and have variances
        proportional to x: least squares with weights 1 / x. Any weights leave the fit unbiased.
        """
        if not self._shares:
            return
        if not table[:, 0].all():
            self._noise.obstacle = self._obstacle or "another process could not measure it"
            return
        _, squares, per_sample, n2, n, known, targets2, parts = table.sum(axis=0).tolist()
        # Back to summed losses: the engine divides by its divisor, the weights by the targets.
        squares, per_sample = (
            value * (num_targets / self._divisor) ** 2 for value in (squares, per_sample)
        )
        rest_x, rest_y = num_samples**2 - n2, num_samples - n
        rest = (grad_norm * num_targets) ** 2 - squares
        if not math.isfinite(rest):
            self._noise.obstacle = "accelerate's own optimizer does not say the gradient's norm"
            return
        if not known or rest_x <= 0:
            self._noise.obstacle = "no process has two micro-batches of it"
            return
        matrix = np.array([[n2 + rest_x, n + rest_y], [n + rest_y, known + rest_y**2 / rest_x]])
        signal, noise = np.linalg.solve(
            matrix, [squares + rest, per_sample + rest * rest_y / rest_x]
        )
        mean = num_targets / num_samples
        variance = (targets2 - num_targets * mean) / (parts - 1)
        self._noise.add(Fit(float(signal), float(noise), mean, variance))
