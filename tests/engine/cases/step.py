"""The step: clipping, schedules, inf."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from accum_trainer import Accumulator, EngineError, causal_lm_loss
from tests.engine.cases.probing import (
    ENGINE,
    Probe,
    _with_scaler,
    accumulator,
    case,
    case_of_accelerate,
    rank,
    world_size,
)
from tests.reference import big_batch, equal, make_model, make_rows, pad, relative_error


@case
def i31_one_clip_of_the_averaged_gradient() -> dict[str, Any]:
    rows, results = make_rows(16), []
    exact = big_batch(make_model("llama"), rows)[1]
    norm = sum((g**2).sum().item() for g in exact.values()) ** 0.5
    limit = norm / 3
    clipped = {name: g * (limit / norm) for name, g in exact.items()}
    for micro in (8, 4, 1):
        acc = accumulator(micro, global_batch_size=16, max_grad_norm=limit)
        # Seen in what it did to the weights, on every engine; a large rate, so that their rounding
        # does not hide it.
        probe = Probe(acc, make_model("llama"), lr=64.0)
        before = probe.weights()
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            update = probe.step()
        after = probe.weights()
        moved = {name: (before[name].double() - after[name].double()) / probe.lr for name in before}
        results.append([relative_error(moved, clipped), abs(update.grad_norm - norm) / norm])
    return {"results": results, "norm": norm}


@case_of_accelerate
def i46_ranks_whose_norms_differ_in_the_last_bits() -> dict[str, Any]:
    """As GPUs of different make: one rank finds another norm of the same gradient, within the
    tolerance, or at its edge."""
    results = {}
    for name, factor in {"bits": 1 + 1e-7, "edge": 1 + 1e-5 * (1 + 5e-6)}.items():
        acc = accumulator(2, global_batch_size=8, max_grad_norm=0.01)
        probe = Probe(acc, make_model("llama"))
        if rank() == world_size() - 1 and world_size() > 1:
            own = acc.engine.square_sum
            acc.engine.square_sum = lambda parameters, own=own, factor=factor: (
                own(parameters) * factor**2
            )  # type: ignore[method-assign]
        error = ""
        try:
            for window in islice(acc.windows(make_rows(8), collate_fn=pad), 1):
                for batch in window:
                    with acc.accumulate(probe.model):
                        acc.backward(causal_lm_loss(probe.model, batch))
                update = probe.step()
            weights = acc.engine.gather_objects({n: w.numpy() for n, w in probe.weights().items()})
            equal_everywhere = all((w[n] == weights[0][n]).all() for w in weights for n in w)
            results[name] = {"equal": equal_everywhere, "norm": update.grad_norm}
        except EngineError as raised:
            error = str(raised)
        results[name] = results.get(name, {}) | {"error": error}
    return results


@case
def i32_lr_knows_updates_only() -> dict[str, Any]:
    """The lr after each update, with the step of the scheduler after every micro-batch, as
    Accelerate loops have it."""
    curves = []
    for micro in (4, 1):
        acc = accumulator(micro, global_batch_size=8)
        probe = Probe(acc, make_model("llama"), lr=1.0, schedule=lambda update: 1 / (1 + update))
        scheduler = acc.prepare(probe.scheduler)
        curve = []
        for batch in acc.batches(make_rows(27), collate_fn=pad):
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
            probe.optimizer.step()
            scheduler.step()
            probe.optimizer.zero_grad()
            if acc.last_update is not None and acc.last_update.step > len(curve):
                curve.append(scheduler.get_last_lr()[0])
        curves.append(curve)
    return {"curves": curves}


def _inject(acc: Accumulator) -> dict[str, Any]:
    """The second of four windows meets an inf on the last rank only."""
    rows = make_rows(32)
    probe = Probe(acc, make_model("llama"), schedule=lambda update: 1 / (1 + update))
    scheduler = acc.prepare(probe.scheduler)
    results = []
    for index, window in enumerate(acc.windows(rows, collate_fn=pad, shuffle=False)):
        before, lr = probe.weights(), scheduler.get_last_lr()[0]
        for number, batch in enumerate(window):
            with acc.accumulate(probe.model):
                bad = index == 1 and number == 0 and rank() == world_size() - 1
                loss = causal_lm_loss(probe.model, batch) * (float("inf") if bad else 1.0)
                acc.backward(loss, reduction="sum")
        update = probe.step(scheduler)
        results.append(
            {
                "unchanged": equal(before, probe.weights()),
                "lr_unchanged": lr == scheduler.get_last_lr()[0],
                "step": update.step,
                "reason": update.reason,
                "gradients_left": probe.left(),
            }
        )
    return {"windows": results}


@case
def i33_inf_is_dropped_everywhere() -> dict[str, Any]:
    return _inject(accumulator(2, global_batch_size=8, max_grad_norm=1.0))


@case_of_accelerate
def i33_inf_is_dropped_everywhere_under_a_scaler() -> dict[str, Any]:
    acc, scaler = _with_scaler(max_grad_norm=1.0)
    return _inject(acc) | {"scale": scaler.get_scale()}


class _Poison(torch.autograd.Function):
    """Leaves the output as it is, and adds inf to a weight's gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.like = weight.shape, weight.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shape, dtype = ctx.like
        return gradient, torch.full(shape, float("inf"), dtype=dtype, device=gradient.device)


@case
def a_parameter_with_inf_in_its_gradient_is_named() -> dict[str, Any]:
    """Two of them have it, on the last rank only, in the second window of three."""
    precisions = ["no"]
    if ENGINE.get("zero_stage", 0) > 0:  # stage 1 has another optimizer of DeepSpeed's then
        precisions.append("bf16")
    results = {}
    for precision in precisions:
        acc = accumulator(2, global_batch_size=8, mixed_precision=precision)
        model, is_bad = make_model("llama"), [False]

        def poison(module: Any, _: Any, output: torch.Tensor, bad: Any = is_bad) -> torch.Tensor:
            return _Poison.apply(output, module.weight) if bad[0] else output

        for layer, name in ((1, "self_attn.q_proj"), (0, "mlp.up_proj")):
            model.model.layers[layer].get_submodule(name).register_forward_hook(poison)
        probe, said = Probe(acc, model), []
        for index, window in enumerate(acc.windows(make_rows(24), collate_fn=pad)):
            is_bad[0] = index == 1 and rank() == world_size() - 1
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            update = acc.step(probe.optimizer)
            said.append([update.reason, update.nonfinite_parameter, math.isfinite(update.loss)])
        results[precision] = said
    return results
