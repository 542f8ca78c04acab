"""Windows: tails, odd counts, constant gradients, order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer import causal_lm_loss
from tests.engine.cases.probing import (
    Probe,
    Slope,
    _slope,
    _with_scaler,
    accumulator,
    case,
    case_of_accelerate,
    planned,
)
from tests.reference import make_model, make_rows, pad, relative_error


@case
def i13_tail_window_is_the_mean_of_its_own() -> dict[str, Any]:
    probe, updates = _slope([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i17_odd_counts_every_sample_once() -> dict[str, Any]:
    """11 samples at B_eff 4: means 2.5, 6.5, 10; the tail of 3 leaves ranks unequal."""
    probe, updates = _slope([float(v) for v in range(1, 12)])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i17_rank_without_a_sample() -> dict[str, Any]:
    probe, updates = _slope([1.0, 2.0, 3.0, 4.0, 7.0])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i19_constant_gradient_is_one() -> dict[str, Any]:
    return {
        f"{policy} K={k}": [g["w"].item() for g in _constant(policy, k).stepped]
        for policy in ("once-per-window", "every-microbatch")
        for k in (1, 3, 8)
    }


def _constant(policy: str, k: int) -> Probe:
    acc = accumulator(2, gradient_accumulation_steps=k, grad_sync=policy)
    probe = Probe(acc, Slope())
    for window in acc.windows(DataLoader(torch.ones(37), batch_size=2), count_targets=len):
        for x in window:
            with acc.accumulate(probe.model):
                acc.backward(probe.model(x).sum(), reduction="sum")
        probe.step()
    return probe


@case
def i14_gradients_empty_at_every_window() -> dict[str, Any]:
    rows = make_rows(22)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    left = []
    windows = acc.windows(rows, collate_fn=pad)
    for _ in range(2):
        for window in windows:
            left.append(probe.left())
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
    return {"left": left, "updates": acc.num_updates, "epoch": windows.epoch}


@case_of_accelerate
def i15_scaler_two_epochs() -> dict[str, Any]:
    rows = make_rows(22)
    acc, scaler = _with_scaler()
    probe = Probe(acc, make_model("llama"))
    windows = acc.windows(rows, collate_fn=pad)
    scales, errors = [], []
    for epoch in range(2):
        for window, expected in zip(windows, planned(rows, 8, epoch), strict=True):
            exact = probe.exact(expected)[1]
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
            errors.append(relative_error(probe.stepped[-1], exact))
            scales.append(scaler.get_scale())
    return {"scales": scales, "errors": errors, "updates": acc.num_updates}


@case
def i21_order_of_micro_batches_does_not_matter() -> dict[str, Any]:
    rows = make_rows(16)
    gradients = []
    for seed in range(3):
        order = np.random.RandomState(seed).permutation(16)
        acc = accumulator(2, global_batch_size=16)
        probe = Probe(acc, make_model("llama"))
        loader = DataLoader([rows[i] for i in order], batch_size=2, collate_fn=pad)
        for window in acc.windows(loader):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
        gradients.append(probe.stepped[-1])
    exact = {name: g.double() for name, g in gradients[0].items()}
    return {"errors": [relative_error(g, exact) for g in gradients[1:]]}
