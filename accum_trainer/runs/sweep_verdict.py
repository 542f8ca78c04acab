"""Which effective batch of a sweep is the largest that loses nothing per sample.

All branches saw the same samples in the same order. Blocks of samples at whose ends every branch
had just ended a window are compared pairwise: the difference of two branches' mean losses on one
block has none of the noise of which samples these were. Only the second half of the blocks counts,
when the branches have left the run that they came from. Knows records, no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from accum_trainer.train.records import Record

# Nats per target that are nothing (Merrill et al. 2025, arXiv:2505.23971, take 0.01).
TOLERANCE = 0.01
_LEAST_BLOCKS = 4
# Student's t at 95 %, by degrees of freedom.
_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
NOTHING, LOSES, UNDECIDED = "loses nothing", "loses", "not decided"


@dataclass(frozen=True)
class Compared:
    """One branch beside the smallest batch.

    Attributes:
        loss: mean per target over the blocks that count.
        difference: its loss less the smallest batch's; 0 for that one.
        margin: of the difference, 95 %.
        verdict: `loses nothing`, `loses` or `not decided`, by the tolerance.
    """

    size: int
    loss: float
    difference: float
    margin: float
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """The comparison of all branches, smallest batch first.

    Attributes:
        largest: the largest effective batch that loses nothing, with every smaller one.
        num_blocks: blocks that count.
        block: samples of a block.
    """

    compared: list[Compared]
    largest: int
    num_blocks: int
    block: int
    tolerance: float

    def describe(self) -> list[str]:
        """Lines for people: a table, then the verdict."""
        rows = [("B_eff", "loss", "against the smallest", "")]
        for one in self.compared:
            against = (
                "" if one is self.compared[0] else f"{one.difference:+.4f} +- {one.margin:.4f}"
            )
            rows.append((str(one.size), f"{one.loss:.4f}", against, one.verdict))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join(
                [*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in rows
        ]
        next_one = next((one for one in self.compared if one.size > self.largest), None)
        found = f"{self.largest} is the largest effective batch that loses nothing per sample"
        if next_one is None:
            found += " of those tried; try larger ones"
        elif self.largest == self.compared[0].size and next_one.verdict == LOSES:
            found = (
                f"every larger effective batch loses per sample against {self.largest}, the "
                "smallest; try smaller ones, or some between it and the next"
            )
        elif next_one.verdict == UNDECIDED:
            found += f"; {next_one.size} is not decided: give more --samples"
        return [*lines, found]


def judge(
    records: Mapping[int, Iterable[Record]], sizes: list[int], tolerance: float = TOLERANCE
) -> Verdict | None:
    """Compare the branches' records, by effective batch; None if there are too few blocks.

    Args:
        records: of each branch, from its first update to its end.
        sizes: smallest first.
        tolerance: nats per target.
    """
    curves = {size: _cumulated(records[size]) for size in sizes}
    ends = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    ends = ends[(len(ends) - 1) // 2 :]
    if len(ends) - 1 < _LEAST_BLOCKS:
        return None
    losses = {size: _block_means(curve, ends) for size, curve in curves.items()}
    weights = np.diff([curves[sizes[0]][end][1] for end in ends])
    first, compared, largest = losses[sizes[0]], [], sizes[0]
    for size in sizes:
        difference = losses[size] - first
        mean = float(np.average(difference, weights=weights))
        margin = 0.0 if size == sizes[0] else _margin(difference)
        verdict = NOTHING
        if mean + margin > tolerance:
            verdict = LOSES if mean - margin > 0 and mean > tolerance else UNDECIDED
        compared.append(
            Compared(size, float(np.average(losses[size], weights=weights)), mean, margin, verdict)
        )
    for one in compared:
        if one.verdict != NOTHING:
            break
        largest = one.size
    block = int(np.median(np.diff(ends)))
    return Verdict(compared, largest, len(ends) - 1, block, tolerance)


def _cumulated(records: Iterable[Record]) -> dict[int, tuple[float, float]]:
    """Samples so far -> (sum of losses, targets) so far, at the end of each window."""
    samples, losses, targets, found = 0, 0.0, 0.0, {0: (0.0, 0.0)}
    for record in records:
        samples += record["effective_batch_size"]
        targets += record["num_targets"]
        if record["loss"] is not None:
            losses += record["loss"] * record["num_targets"]
        found[samples] = (losses, targets)
    return found


def _block_means(curve: Mapping[int, tuple[float, float]], ends: list[int]) -> np.ndarray:
    sums = np.diff([curve[end] for end in ends], axis=0)
    means: np.ndarray = sums[:, 0] / np.maximum(sums[:, 1], 1e-9)
    return means


def _margin(differences: np.ndarray) -> float:
    """Half the 95 % interval of the mean of paired differences; neighbours that are alike count for
    less (their correlation, as of an AR(1) process, lowers the number of blocks)."""
    count = len(differences)
    centred = differences - differences.mean()
    power = float((centred**2).sum())
    if not power:
        return 0.0
    alike = min(0.9, max(0.0, float((centred[1:] * centred[:-1]).sum()) / power))
    effective = max(2.0, count * (1 - alike) / (1 + alike))
    deviation = math.sqrt(power / (count - 1))
    return _QUANTILES.get(round(effective) - 1, 2.1) * deviation / math.sqrt(effective)
