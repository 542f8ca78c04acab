"""Cuts of one window: packed, by tokens, in unequal shares, of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from accum_trainer import DataError, causal_lm_loss
from accum_trainer.losses.packing import find_packing, worst_of
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.window_plan import Cost, Cut
from tests.engine.cases.probing import (
    Probe,
    accumulator,
    case,
    compare,
    lengths,
    planned,
    rank,
    world_size,
)
from tests.reference import IGNORE, make_model, make_rows, pad, relative_error


@case
def i6_packed_samples() -> dict[str, Any]:
    """Samples end to end in one row, position ids that restart, no padding: the gradient of the
    padded big batch."""
    rows = make_rows(12)
    acc = accumulator(1, global_batch_size=4)
    model = make_model("llama")
    model.config.use_cache = (
        False  # with a cache transformers does not look for restarting positions
    )
    probe = Probe(acc, model)
    packed = []
    for begin in range(0, 12, 3):
        part = rows[begin : begin + 3]
        joined = {
            "input_ids": [t for row in part for t in row["input_ids"]],
            "position_ids": [i for row in part for i in range(len(row["input_ids"]))],
            # The first label of each sample would be predicted from the sample before it.
            "labels": [label for row in part for label in [IGNORE, *row["labels"][1:]]],
        }
        packed.append({key: torch.tensor([value]) for key, value in joined.items()})
    exact_loss, exact = probe.exact(rows)
    for window in acc.windows(packed[rank() :: world_size()].__iter__()):
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
        update = probe.step()
    return {
        "errors": [
            relative_error(probe.stepped[-1], exact),
            abs(update.loss - exact_loss) / exact_loss,
        ]
    }


@case
def i40_i41_packed_samples_that_see_each_other() -> dict[str, Any]:
    """A cache left on: refused for the model's own loss, exact for ours. A convolution: refused,
    then padded and exact.

    Under `train` the proof also tries what the model needs, which may raise in the midst of a
    forward.
    """
    from tests.test_packing import make

    rows = make_rows(12)
    own = [PackingCollator()(rows[begin : begin + 3]) for begin in range(0, 12, 3)][
        rank() :: world_size()
    ]

    def run(probe: Probe, windows: Any, loss: Callable[..., Any]) -> Any:
        for window in windows:
            for batch in window:
                with probe.acc.accumulate(probe.model):
                    probe.acc.backward(loss(probe.model, batch))
            return probe.step()

    def refused(model: torch.nn.Module, loss: Callable[..., Any]) -> str:
        acc = accumulator(1, global_batch_size=4)
        probe = Probe(acc, model)
        try:
            run(probe, acc.windows(iter(own)), loss)
        except DataError as error:
            return str(error)
        return ""

    messages = [refused(make_model("llama"), lambda model, batch: model(**batch).loss)]
    messages.append(refused(make("Lfm2"), causal_lm_loss))
    errors = []
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, make_model("llama"))
    exact = probe.exact(rows)[1]
    run(probe, acc.windows(iter(own)), causal_lm_loss)
    errors.append(relative_error(probe.stepped[-1], exact))

    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make("Lfm2"))
    engine, ids = acc.engine, torch.tensor(rows[2]["input_ids"])
    found = find_packing(
        engine.unwrap(probe.model),
        ids,
        most=64,
        backward=engine.runs_alone,
        agree=lambda own: worst_of(engine.gather_objects(own)),
    )
    exact = probe.exact(planned(rows, 12)[0])[1]
    run(probe, acc.windows(rows, collate_fn=pad, lengths=lengths(rows)), causal_lm_loss)
    errors.append(relative_error(probe.stepped[-1], exact))
    return {"messages": messages, "errors": errors, "reason": found.reason}


@case
def every_cut_gives_the_same_gradient() -> dict[str, Any]:
    """Padded to a multiple, packed, by a token budget, with unequal shares: errors against the
    float64 big batch, by cut."""
    rows = make_rows(37, all_masked=(3, 4, 8))
    shares = (3.0, 1.0) if world_size() == 2 else None
    cuts = {
        "multiple of 8": Cut(3, multiple=8),
        "packed": Cut(3, packed=True),
        "at most 64 tokens": Cut(max_tokens=64, cost=Cost(8.0, 0.01)),
        "at most 64 tokens, packed": Cut(max_tokens=64, packed=True),
        "shares 3:1": Cut(3, rank_weights=shares),
        "shares 3:1 of at most 64 tokens": Cut(
            max_tokens=64, rank_weights=shares, cost=Cost(8.0, 0.01)
        ),
    }
    found = {}
    for name, cut in cuts.items():
        acc = accumulator(None if cut.max_tokens else 3, global_batch_size=12)
        model = make_model("llama")
        model.config.use_cache = (
            False  # with a cache transformers does not look for restarting positions
        )
        probe = Probe(acc, model)
        cut = dataclasses.replace(cut, equal_counts=acc.engine.equal_micro_batches)
        collate = PackingCollator() if cut.packed else PaddingCollator(0, cut.multiple)
        windows = acc.windows(
            rows, collate_fn=collate, lengths=lengths(rows), cut=cut, prefetch=True
        )
        found[name] = compare(probe, windows, planned(rows, 12))
    return {"cuts": found}


@case
def r52_global_batch_that_does_not_divide() -> dict[str, Any]:
    """B_eff 10 in micro-batches of at most 4: windows of 10, 10, 10 and 7."""
    rows = make_rows(37, all_masked=(3, 4, 8))
    acc = accumulator(4, global_batch_size=10)
    probe = Probe(acc, make_model("llama"))
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows))
    return compare(probe, windows, planned(rows, 10))
