"""Fifty updates, however the batch is cut."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from accum_trainer import causal_lm_loss
from accum_trainer.sources.collating import PackingCollator
from accum_trainer.window_plan import Cut
from tests.engine.cases.probing import accumulator, case, lengths, planned, world_size
from tests.reference import make_model, make_rows, pad


def curve_of_one_big_batch(rows: list[dict], updates: int) -> list[float]:
    """Losses of AdamW on whole windows of 16 rows, in float64, by torch alone."""
    model = make_model("llama").double()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for epoch in itertools.count():
        for window in planned(rows, 16, epoch):
            batch = pad(window)
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            losses.append(loss.item())
            if len(losses) == updates:
                return losses
    raise AssertionError


@case
def i36_fifty_updates() -> dict[str, Any]:
    rows = make_rows(16 * 10 + 5)
    curves = {"truth": curve_of_one_big_batch(rows, 50)}
    cuts = [(micro, Cut(micro), "") for micro in ((16, 4) if world_size() == 1 else (2, 1))]
    cuts += [(4, Cut(4, packed=True), ", packed")]
    if world_size() == 2:
        cuts += [(2, Cut(2, rank_weights=(3.0, 1.0)), ", shares 3:1")]
    for micro, cut, how in cuts:
        acc = accumulator(micro, global_batch_size=16, max_grad_norm=1.0)
        model = make_model("llama")
        model.config.use_cache = (
            False  # with a cache transformers does not look for restarting positions
        )
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prepared, optimizer = acc.prepare(model, adam)
        cut = dataclasses.replace(cut, equal_counts=acc.engine.equal_micro_batches)
        collate = PackingCollator() if cut.packed else pad
        windows = acc.windows(rows, collate_fn=collate, lengths=lengths(rows), cut=cut)
        losses: list[float] = []
        while len(losses) < 50:
            for window in windows:
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                losses.append(acc.step(optimizer).loss)
                if len(losses) == 50:
                    break
        curves[f"B={micro} K={acc.plan.gradient_accumulation_steps} W={world_size()}{how}"] = losses
    return {"curves": curves}
