"""Known faults of training steps: a sentence and a formula for each, and its gradient of a window.

With L_rk the summed loss of rank r's micro-batch k and n_rk its targets, the right gradient is g =
sum_rk grad(L_rk) / N. A fault gives micro-batches other weights, drops some, clips too often,
rounds, or adds an old gradient. Knows the reference's gradients; no loop and no tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from accum_trainer.batch import IGNORE
from accum_trainer.verify.big_batch import BigBatch, Gradient, Row, clip_factor

Vector = torch.Tensor  # a gradient of all trained parameters, flat, float64
# [rank][step]: the factor of a micro-batch's summed loss in the averaged gradient.
Weights = list[list[float]]

RIGHT = (
    "right: weight = gradient_divisor / N for every micro-batch's summed loss, N = targets of "
    "the whole window"
)


@dataclass(frozen=True)
class Fault:
    """A known mistake: one sentence for the report, and the formula that the loop computes."""

    sentence: str
    formula: str


MEAN_OF_MEANS = Fault(
    "mean of means: every micro-batch has the same weight, however many targets it holds",
    "mean over micro-batches of L_rk / n_rk",
)
PER_RANK = Fault(
    "normalised per rank: each rank divides by its own number of targets, so all ranks have the "
    "same weight",
    "mean over ranks of sum_k L_rk / sum_k n_rk",
)
COUNTS_FIRST = Fault(
    "first labels are counted: N = (labels != -100).sum() counts a row's first label, which the "
    "shift drops; count labels[:, 1:]",
    "n_rk + f_rk in place of n_rk, f_rk rows whose first label is not -100",
)
WEIGHS_FIRST = Fault(
    "first labels are weighed: the model's mean loss is multiplied by (labels != -100).sum(), "
    "which counts a row's first label, and the shift drops it; multiply by the count of "
    "labels[:, 1:]",
    "sum_rk (n_rk + f_rk) * L_rk / n_rk / sum_rk (n_rk + f_rk), f_rk rows whose first label is not "
    "-100",
)
TWICE = Fault(
    "division by K twice: the loss is divided by K (or by N) and accelerator.backward divides by K "
    "again",
    "g / K",
)
TAIL = Fault(
    "the tail is divided by K: a last window of m < K micro-batches is scaled as if it had K",
    "g * m / K, m micro-batches in the tail",
)
NOT_TIMES_W = Fault(
    "not multiplied by the number of processes: the loss is divided by the N of all ranks, and DDP "
    "then averages over ranks",
    "g / W",
)
SUMMED = Fault("summed, not averaged, over micro-batches: nothing divides by K", "g * K")
LAST_ONLY = Fault(
    "zero_grad per micro-step: only the gradient of the last micro-batch is left",
    "weight * L_rk of the last k only",
)
CLIP_EACH = Fault(
    "clip per micro-step: the accumulated gradient is clipped after every micro-batch, not once "
    "per update",
    "a = clip(a + weight * grad L_rk) for each k",
)
IN_BF16 = Fault(
    "gradients are accumulated in bf16: small contributions are rounded away",
    "a = bf16(a + bf16(weight * grad L_rk)) for each k",
)
LEFTOVER = Fault(
    "zero_grad is missing: the gradient of the window before is still in this one",
    "g + g of the window before",
)


class MicroBatchGradients:
    """A window by the definition: the gradient of each micro-batch's summed loss, and its targets.

    Attributes:
        gradients[rank][step]: flat, float64.
        targets[rank][step]: n_rk.
        first_labels[rank][step]: f_rk, rows whose first label is not -100; the shift drops it, so
            it is no target.
        num_targets: N, of the window.

    Args:
        exact: the model in float64, with the window's weights.
        sizes: the trained parameters, name -> number of elements.
        ranks: the rows of each rank's micro-batches.
        steps: K; a tail has fewer.
    """

    def __init__(
        self, exact: BigBatch, sizes: dict[str, int], ranks: list[list[list[Row]]], steps: int
    ) -> None:
        truths = [[exact.truth(rows) for rows in rank] for rank in ranks]
        self._steps = steps
        self.gradients = [[flat(truth.gradient, sizes) for truth in rank] for rank in truths]
        self.targets = [[truth.num_targets for truth in rank] for rank in truths]
        self.first_labels = [
            [sum(row["labels"][0] != IGNORE for row in rows) for rows in rank] for rank in ranks
        ]
        self.num_targets = sum(map(sum, self.targets))
        self._world_size = len(truths)

    def combine(self, weights: Weights) -> Vector:
        return torch.stack(
            [
                w * g
                for r, rank in enumerate(self.gradients)
                for w, g in zip(weights[r], rank, strict=True)
            ]
        ).sum(0)

    @property
    def right(self) -> Weights:
        return self._each(lambda r, k: 1 / self.num_targets)

    def candidates(
        self, leftover: Vector, max_grad_norm: float | None
    ) -> Iterator[tuple[tuple[Fault, ...], Vector]]:
        """The gradient of each known fault, and of several together, on these micro-batches.

        Args:
            leftover: the gradient that the window before left behind.
            max_grad_norm: the norm that a loop may clip to.
        """

        def clip(vector: Vector) -> Vector:
            return vector * clip_factor(float(vector.norm()), max_grad_norm)

        linear = list(self._linear())
        for faults, weights in linear:
            if faults:
                yield faults, self.combine(weights)
        for faults, weights in linear:
            if len(faults) > 1 and (COUNTS_FIRST in faults or WEIGHS_FIRST in faults):
                continue  # too many combinations of three faults to try
            last = [
                [w if k == len(rank) - 1 else 0.0 for k, w in enumerate(rank)] for rank in weights
            ]
            yield (*faults, LAST_ONLY), self.combine(last)
            if max_grad_norm is not None:
                yield (*faults, CLIP_EACH), self._clipped_each(weights, clip)
            yield (*faults, IN_BF16), self._in_bf16(weights)
            if leftover.any():
                yield (*faults, LEFTOVER), self.combine(weights) + leftover

    def _each(self, weight: Callable[[int, int], float]) -> Weights:
        return [[weight(r, k) for k in range(len(rank))] for r, rank in enumerate(self.targets)]

    def _linear(self) -> Iterator[tuple[tuple[Fault, ...], Weights]]:
        """Faults that only change the weights of micro-batches: a way to normalise, times a factor
        too many or too few."""
        targets, ranks, steps = self.targets, self._world_size, self._steps
        counts = [
            [n + f for n, f in zip(*pair, strict=True)]
            for pair in zip(targets, self.first_labels, strict=True)
        ]
        bases: list[tuple[tuple[Fault, ...], Weights]] = []
        for faults, counted in (((), targets), ((COUNTS_FIRST,), counts)):
            bases += self._normalised(faults, counted)
        total = sum(map(sum, counts))
        bases.append(
            ((WEIGHS_FIRST,), self._each(lambda r, k: counts[r][k] / max(1, targets[r][k]) / total))
        )
        factors: list[tuple[tuple[Fault, ...], Callable[[int], float]]] = [((), lambda r: 1.0)]
        if any(len(rank) < steps for rank in targets):
            factors.append(((TAIL,), lambda r: len(targets[r]) / steps))
        factors += [((TWICE,), lambda r: 1 / steps), ((SUMMED,), lambda r: float(len(targets[r])))]
        if ranks > 1:
            factors += [
                ((NOT_TIMES_W,), lambda r: 1 / ranks),
                ((TWICE, NOT_TIMES_W), lambda r: 1 / ranks / steps),
            ]
        for factor_faults, factor in factors:
            for base_faults, base in bases:
                yield (
                    base_faults + factor_faults,
                    [[w * factor(r) for w in rank] for r, rank in enumerate(base)],
                )

    def _normalised(
        self, faults: tuple[Fault, ...], counts: list[list[int]]
    ) -> list[tuple[tuple[Fault, ...], Weights]]:
        """Weights by `counts` of targets: normalised over the window, per micro-batch, per rank."""
        total, ranks = sum(map(sum, counts)), self._world_size
        each = [
            (faults, self._each(lambda r, k: 1 / total)),
            (
                (MEAN_OF_MEANS, *faults),
                self._each(lambda r, k: 1 / (max(1, counts[r][k]) * len(counts[r]) * ranks)),
            ),
        ]
        if ranks > 1:
            each.append(
                ((PER_RANK, *faults), self._each(lambda r, k: 1 / (max(1, sum(counts[r])) * ranks)))
            )
        return each

    def _clipped_each(self, weights: Weights, clip: Callable[[Vector], Vector]) -> Vector:
        """Each rank clips its accumulated gradient; the last clip comes after the exchange, on the
        mean over ranks."""
        ranks = []
        for weights_of, gradients in zip(weights, self.gradients, strict=True):
            total = torch.zeros_like(gradients[0])
            for weight, gradient in zip(weights_of, gradients, strict=True):
                total = clip(total) + self._world_size * weight * gradient
            ranks.append(total)
        return clip(torch.stack(ranks).mean(0))

    def _in_bf16(self, weights: Weights) -> Vector:
        """The mean over ranks of gradients accumulated in bf16."""
        ranks = []
        for weights_of, gradients in zip(weights, self.gradients, strict=True):
            total = torch.zeros_like(gradients[0], dtype=torch.bfloat16)
            for weight, gradient in zip(weights_of, gradients, strict=True):
                total += (self._world_size * weight * gradient).bfloat16()
            ranks.append(total.double())
        return torch.stack(ranks).mean(0)


def flat(gradient: Gradient, sizes: dict[str, int]) -> Vector:
    """All parameters' gradients in one vector, in the order of `sizes`; missing ones are 0."""
    zero = torch.zeros(0, dtype=torch.float64)
    pieces = [
        gradient[n].flatten() if n in gradient else zero.new_zeros(size)
        for n, size in sizes.items()
    ]
    return torch.cat(pieces).double()
