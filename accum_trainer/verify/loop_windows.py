"""The windows that a user's loop is given: cuts of the same rows that tell known faults apart.

Ragged micro-batches show a mean of means; ranks with very different numbers of targets, a loop
normalised per rank; a tail with fewer than K micro-batches, a division by K; a micro-batch without
a target, 0/0; first labels on some rows only, a loop that counts them; a long row, a loop that cuts
rows. The first window comes again at the end, for a loop that changes after its first calls. Knows
rows and the plan; nothing of models and loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from accum_trainer.batch import IGNORE
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.verify.big_batch import Row, num_targets

# ranks[rank][step] is a micro-batch, a list of rows.
Cut = list[list[list[Row]]]
# Longer rows are left out, but for one, if enough shorter ones exist: the other windows are about
# weights, and long rows cost time.
SHORT = 96
FIRST, LONG_ROW = "ragged window", "a long row"


@dataclass(frozen=True)
class LoopWindow:
    """One update's rows, cut into each rank's micro-batches.

    Attributes:
        hint: a sentence about a loop that is wrong here and right in the first window.
    """

    name: str
    ranks: Cut
    hint: str = ""

    @property
    def rows(self) -> list[Row]:
        return [row for rank in self.ranks for micro_batch in rank for row in micro_batch]


def windows_for(rows: Sequence[Row], plan: BatchPlan, variant: int = 0) -> list[LoopWindow]:
    """The windows for a loop, the same on all ranks; another `variant` takes other rows."""
    batch, steps, ranks = plan.micro_batch_size, plan.gradient_accumulation_steps, plan.world_size
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    long_row = by_length[-1 - min(variant, len(rows) - 1)]
    short = [row for row in rows if len(row["input_ids"]) <= SHORT]
    rows = short if len(short) >= plan.global_batch_size else rows
    shortest_first = sorted(rows, key=num_targets)

    def take(count: int) -> list[Row]:
        """`count` rows, evenly from the shortest to the longest."""
        last = len(rows) - 1
        return [
            shortest_first[min(int(i) + variant, last)] for i in np.linspace(0, last, count).round()
        ]

    def cut(chosen: list[Row], num_steps: int) -> list[list[Row]]:
        return [chosen[k * batch : (k + 1) * batch] for k in range(num_steps)]

    whole, size = take(batch * steps * ranks), batch * steps
    ragged = [cut(whole[r::ranks], steps) for r in range(ranks)]
    windows = [LoopWindow(FIRST, ragged)]
    if ranks > 1:
        uneven = [cut(whole[r * size : (r + 1) * size], steps) for r in range(ranks)]
        windows.append(LoopWindow("uneven ranks", uneven))
    # More than one micro-batch if possible: with one, m / K and 1 / K look alike.
    fewer = max(1, min(steps - 1, steps // 2 + 1))
    tail = take(batch * fewer * ranks)
    tails = [cut(tail[r::ranks], fewer) for r in range(ranks)]
    tails[0][-1] = tails[0][-1][-1:]
    windows.append(LoopWindow("tail window", tails))
    masked: list[Row] = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in ragged[0][0]]
    empty = [[masked, *ragged[0][1:]], *ragged[1:]]
    hint = (
        f"only this window has a row of {len(long_row['input_ids'])} tokens: does the loop cut "
        "rows, or leave long ones out?"
    )
    with_long = [*ragged[:-1], [*ragged[-1][:-1], [*ragged[-1][-1][:-1], long_row]]]
    windows.append(LoopWindow(LONG_ROW, with_long, hint))
    marked = [replace(window, ranks=_with_first_labels(window.ranks)) for window in windows]
    # Its first micro-batch has no label at all, so the model's own mean loss is 0/0 there.
    without = LoopWindow("a micro-batch without a target", _with_first_labels(empty, begin=1))
    return [*marked, without]


def repeated(windows: Sequence[LoopWindow]) -> list[LoopWindow]:
    """The first window, of each variant, once more, under another name."""
    hint = (
        "the same window was right in an earlier call: does the loop keep something between its "
        "calls, or count them?"
    )
    return [
        replace(window, name=f"{FIRST} again", hint=hint)
        for window in windows
        if window.name == FIRST
    ]


def _with_first_labels(ranks: Cut, begin: int = 0) -> Cut:
    """Give a first label to the rows of every other micro-batch (from `begin`) on every other rank;
    remove it from all other rows.

    The shift drops a row's first label, so no target and no loss changes. A loop that counts it is
    visible only if micro-batches and ranks have different numbers of first labels; data with masked
    prompts have none.
    """

    def first(row: Row, is_counted: bool) -> Row:
        label = row["input_ids"][0] if is_counted else IGNORE
        return {**row, "labels": [label, *row["labels"][1:]]}

    return [
        [
            [first(row, r % 2 == 0 and k >= begin and (k - begin) % 2 == 0) for row in rows]
            for k, rows in enumerate(rank)
        ]
        for r, rank in enumerate(ranks)
    ]
