"""Packed samples under each attention: the gradient of their update against padded rows in float64.

Before that, what the package's own proof decides about this model and attention
(`accum_trainer.losses.packing`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from accum_trainer.lm.packed_attention import PACKED_SDPA, attend_inside_samples
from benchmarks.gpu.models import llama
from benchmarks.gpu.part import Result, Setting, Table, one_line
from tests.reference import big_batch, make_rows, pad, relative_error

FLOAT32 = 2e-5  # a GPU's kernels for float32; on a CPU 1e-6
SIXTEEN_BIT = 1.25  # times what padded rows are off in bf16
HEADER = [
    "attention",
    "precision",
    "proof",
    "boundaries given",
    "error of packed",
    "error of padded",
]


def packing(setting: Setting) -> Result:
    tried = [("sdpa", "no"), ("sdpa", "bf16"), (PACKED_SDPA, "no"), (PACKED_SDPA, "bf16")]
    if not setting.cpu:
        tried += [("flash_attention_2", "bf16"), ("flash_attention_3", "bf16")]
    result = _all(setting, tried)
    result.notes.append(
        f"{PACKED_SDPA} in bf16 is torch's varlen_attn on a GPU, else a loop over samples."
    )
    result.needs_gpu(setting, "Flash attention")
    return result


def flex(setting: Setting) -> Result:
    """Apart from the others: it is compiled for minutes."""
    return _all(setting, [("flex_attention", "no"), ("flex_attention", "bf16")])


def _all(setting: Setting, tried: list[tuple[str, str]]) -> Result:
    result = Result(Table(HEADER, []))
    # 64 numbers per head, as kernels want them.
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
    model = llama("1M", **sizes)
    rows = make_rows(12, longest=40 if setting.small else 200)
    exact = big_batch(model, rows)[1]
    for attention, precision in tried:
        optional = attention.startswith("flash")
        try:
            _one(setting, result, copy.deepcopy(model), attention, precision, rows, exact)
        except (
            Exception
        ) as error:  # of any type: a kernel's own; it is shown, and the others are run
            result.table.rows.append([attention, precision, one_line(error), "-", "-", "-"])
            if not (optional and isinstance(error, ImportError)):
                result.check(f"{attention}, {precision}", False, one_line(error))
    result.notes.append(
        "Relative errors of the whole gradient, one update of 12 ragged rows in three "
        "micro-batches."
    )
    return result


def _one(
    setting: Setting,
    result: Result,
    model: Any,
    attention: str,
    precision: str,
    rows: list[dict],
    exact: Any,
) -> None:
    from accum_trainer.losses.packing import find_packing

    if attention == PACKED_SDPA:
        assert attend_inside_samples(model)
    else:
        model.set_attn_implementation(attention)
    acc = _accumulator(setting, precision)
    prepared, _ = _prepared(acc, model)
    tokens = torch.tensor(rows[0]["input_ids"], device=acc.device)
    most = sum(len(row["input_ids"]) for row in rows)
    found = find_packing(
        acc.engine.unwrap(prepared), tokens, most=most, is_16_bit=precision != "no"
    )
    name = f"{attention}, {precision}"
    result.check(f"{name}: the proof holds", found.holds, found.reason)
    packed = padded = "-"
    if found.holds:
        packed = _error(setting, model, precision, rows, exact, found.boundaries)
        padded = _error(setting, model, precision, rows, exact, None)
        limit = FLOAT32 if precision == "no" else SIXTEEN_BIT * padded
        result.at_most(f"{name}: the packed gradient", packed, limit)
    given = ", ".join(found.boundaries) or "none"
    result.table.rows.append([attention, precision, found.reason, given, packed, padded])


def _accumulator(setting: Setting, precision: str) -> Any:
    from accelerate.state import AcceleratorState, GradientState

    from accum_trainer import Accumulator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accumulator(
        micro_batch_size=4, global_batch_size=12, cpu=setting.cpu, mixed_precision=precision
    )


def _prepared(acc: Any, model: Any) -> tuple[Any, Any]:
    model = copy.deepcopy(model).train()
    return acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))


def _error(
    setting: Setting,
    model: Any,
    precision: str,
    rows: list[dict],
    exact: Any,
    boundaries: tuple[str, ...] | None,
) -> float:
    """Of one update of all rows, packed with these boundaries, or padded where they are None."""
    from accum_trainer import causal_lm_loss
    from accum_trainer.sources.collating import PackingCollator
    from accum_trainer.window_plan import Cut

    acc = _accumulator(setting, precision)
    prepared, optimizer = _prepared(acc, model)
    collate, cut = (
        (pad, Cut(4)) if boundaries is None else (PackingCollator(boundaries), Cut(4, packed=True))
    )
    for window in acc.windows(rows, collate_fn=collate, cut=cut):
        for batch in window:
            with acc.accumulate(prepared):
                acc.backward(causal_lm_loss(prepared, batch))
        found = {name: g.cpu().clone() for name, g in acc.engine.full_gradients(prepared).items()}
        acc.step(optimizer)
    return relative_error(found, exact)
