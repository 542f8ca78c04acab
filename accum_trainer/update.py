"""The end of a window: one exchange of a few numbers, and `Update`, the record of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accum_trainer.exchanged import WindowEnd, refuse_other_windows
from accum_trainer.window import Window


@dataclass(frozen=True)
class Update:
    """The record of one window.

    Attributes:
        step: optimizer updates made so far, this one included; a skipped window makes none.
        loss: mean over the window's targets over all ranks, unscaled; nan for an empty window.
        grad_norm: 2-norm of the averaged, unscaled gradient before clipping; nan if empty.
        num_targets: N, over all ranks: targets, or the sum of their weights if the loss has some.
        num_samples: samples of the window over all ranks.
        num_tokens: tokens of `input_ids` over all ranks, without padding; 0 if there are none.
        num_positions: the same with padding: the positions that were computed.
        num_micro_batches: micro-batches of the window over all ranks.
        gradient_accumulation_steps: the most micro-batches that one rank ran: K, fewer in a tail
            window, more after splits.
        skipped: the optimizer did not step.
        reason: why it was skipped: "empty" (no target), "non-finite" (inf or nan in the gradient),
            else "".
        nonfinite_parameter: the first with inf or nan in its averaged gradient, if so; else "".
        stop_requested, save_requested: some rank called `request_stop`, `request_save`; all ranks
            see it at the same update.
        num_splits: splits of micro-batches over all ranks, because one ran out of memory,
            including pre-emptive ones at a size that already ran out.
    """

    step: int
    loss: float
    grad_norm: float
    num_targets: float
    num_samples: int
    num_tokens: int
    num_positions: int
    num_micro_batches: int
    gradient_accumulation_steps: int
    skipped: bool = False
    reason: str = ""
    nonfinite_parameter: str = ""
    stop_requested: bool = False
    save_requested: bool = False
    num_splits: int = 0


def end_row(window: Window, stop: bool, save: bool) -> list[float | torch.Tensor]:
    """This rank's numbers for the exchange that ends `window`, with the next window's counts."""
    end = WindowEnd(
        loss_sum=window.loss_sum,
        stop_requested=stop,
        save_requested=save,
        num_splits=window.num_splits,
        num_micro_batches=len(window),
        position=window.position.checksum(),
    )
    norms = window.norms.to_row(window.num_splits)
    return end.to_row([*norms, *window.reader.counts_ahead()])


def conclude(
    engine: Any, window: Window, table: np.ndarray, grad_norm: float, stepped: bool, reason: str
) -> Update:
    """The record of a window, from every rank's `end_row`, shape (ranks, numbers).

    Raises:
        EngineError: on all ranks, if one was in another window than rank 0.
    """
    ends, behind = WindowEnd.from_rows(table)
    if len({end.position for end in ends}) > 1:
        refuse_other_windows(engine.gather_objects(tuple(window.position)))
    norms, counts_ahead = np.split(behind, [window.norms.size], axis=1)
    window.reader.learn_ahead(counts_ahead)
    if stepped:
        window.norms.learn(norms, window.num_samples, window.num_targets, grad_norm)
    num_splits = int(sum(end.num_splits for end in ends))
    loss_sum = float(sum(end.loss_sum for end in ends))
    return Update(
        step=window.position.num_updates + stepped,
        loss=loss_sum / window.num_targets if window.num_targets > 0 else math.nan,
        grad_norm=grad_norm,
        num_targets=window.num_targets,
        num_samples=window.num_samples,
        num_tokens=window.num_tokens,
        num_positions=window.num_positions,
        num_micro_batches=window.num_micro_batches + num_splits,
        gradient_accumulation_steps=int(max(end.num_micro_batches for end in ends)),
        skipped=not stepped,
        reason=reason,
        nonfinite_parameter=engine.nonfinite_parameter if reason == "non-finite" else "",
        stop_requested=any(end.stop_requested for end in ends),
        save_requested=any(end.save_requested for end in ends),
        num_splits=num_splits,
    )
