"""16 bits, and what accumulates in float32."""

from __future__ import annotations

from typing import Any

import torch

from accum_trainer import causal_lm_loss
from tests.engine.cases.probing import (
    ENGINE,
    Probe,
    Slope,
    accumulator,
    case,
    forget_accelerate,
    lengths,
    world_size,
)
from tests.engine.cases.usage import refusal
from tests.reference import big_batch, make_model, make_rows, pad, relative_error


@case
def i30_gradients_accumulate_in_float32() -> dict[str, Any]:
    """Weights in bf16 and micro-batches with gradients 256, 1, -256: the sum is 1, which bf16 would
    make 0."""
    if ENGINE.get("zero_stage") == 0:
        return {"refused": refusal(lambda: accumulator(1, mixed_precision="bf16"))}
    sharded = set(ENGINE) & {"zero_stage", "fsdp"}
    gradients = []
    for dtype in ("float32", "bfloat16"):
        # Sharded engines keep a float32 master copy and make the bf16 weights themselves.
        own_weights = {"mixed_precision": "bf16"} if sharded else {}
        acc = accumulator(1, gradient_accumulation_steps=3, accumulation_dtype=dtype, **own_weights)
        probe = Probe(acc, Slope() if sharded else Slope().bfloat16())
        data = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, -256.0)]
        # Counted so that N is the number of ranks: every weight is then 1 and nothing is rounded
        # before the sum.
        for window in acc.windows(iter(data), count_targets=lambda _: 1 / 3):
            for x in window:
                with acc.accumulate(probe.model):
                    acc.backward(probe.model(x).sum(), reduction="sum")
            probe.step()
        gradients.append(probe.stepped[-1]["w"].item())
    return {"gradients": gradients}


@case
def bf16_is_as_near_as_one_big_bf16_batch() -> dict[str, Any]:
    """Errors against float64 of our updates and of one big batch in bf16, both with the engine's
    own bf16."""
    if ENGINE.get("zero_stage") == 0:
        return {"refused": refusal(lambda: accumulator(1, mixed_precision="bf16"))}
    rows = make_rows(16)
    errors = {}
    for name, micro in (("ours", 2), ("big", 16 // world_size())):
        if "zero_stage" not in ENGINE:
            forget_accelerate()
        acc = accumulator(micro, global_batch_size=16, mixed_precision="bf16")
        probe = Probe(acc, make_model("llama"))
        exact = big_batch(probe.pristine, rows)[1]
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
        errors[name] = relative_error(probe.stepped[-1], exact)
    return {"ours": errors["ours"], "big": errors["big"]}


ONCE, EVERY = "once-per-window", "every-microbatch"


@case
def combinations() -> dict[str, Any]:
    return _combined([(True, ONCE), (False, EVERY)])


@case
def more_combinations() -> dict[str, Any]:
    return _combined([(False, ONCE), (True, EVERY)])


def _combined(cuts: list[tuple[bool, str]]) -> dict[str, Any]:
    """{full, LoRA} x {float32, bf16} x (checkpointing, policy): each gradient's error, after that
    of one big batch of its kind."""
    rows = make_rows(14)  # a tail window of 14 at B_eff 16: ranks hold unequal shares
    errors: dict[str, list[float]] = {}
    for kind in ("llama", "lora"):
        exact = big_batch(make_model(kind), rows)[1]
        for precision in ("no", "bf16"):
            if precision == "bf16" and ENGINE.get("zero_stage") == 0:
                continue  # refused, and the refusal tested
            for micro, checkpointing, policy in [
                (16 // world_size(), False, ONCE),
                *((2, *cut) for cut in cuts),
            ]:
                if "zero_stage" not in ENGINE:
                    forget_accelerate()
                model = make_model(kind)
                if checkpointing:
                    model.gradient_checkpointing_enable(
                        gradient_checkpointing_kwargs={"use_reentrant": False}
                    )
                acc = accumulator(
                    micro, global_batch_size=16, mixed_precision=precision, grad_sync=policy
                )
                probe = Probe(acc, model.train())
                for window in acc.windows(rows, collate_fn=pad, lengths=lengths(rows)):
                    for batch in window:
                        with acc.accumulate(probe.model):
                            acc.backward(causal_lm_loss(probe.model, batch))
                    probe.step()
                errors.setdefault(f"{kind} {precision}", []).append(
                    relative_error(probe.stepped[-1], exact)
                )
    return {"errors_by_kind": errors}
