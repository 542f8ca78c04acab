"""Losses: sums, means, weights, smoothing, two terms, and windows without a target."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer import causal_lm_loss
from accum_trainer.losses import chunked, head
from accum_trainer.window_plan import global_order, windows_of
from tests.engine.cases.probing import (
    Probe,
    Slope,
    accumulator,
    case,
    compare,
    lengths,
    models_own_mean,
    rank,
    world_size,
)
from tests.reference import (
    IGNORE,
    big_batch,
    equal,
    make_model,
    make_rows,
    num_targets,
    pad,
    relative_error,
)


@case
def i2_three_against_three_hundred() -> dict[str, Any]:
    few = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    ids = np.random.RandomState(0).randint(1, 97, 301).tolist()
    rows = [few, {"input_ids": ids, "labels": ids}]
    acc = accumulator(1, global_batch_size=2)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad, shuffle=False), [rows])


class SwallowsKwargs(torch.nn.Module):
    """A model that takes **kwargs and averages by its own idea, whatever `num_items_in_batch` it is
    told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inner(
            input_ids=input_ids, attention_mask=kwargs["attention_mask"], labels=labels
        ).loss


@case
def i3_kwargs_model_has_one_norm() -> dict[str, Any]:
    rows = make_rows(8)
    norms = []
    for k in (1, 8 // world_size()):
        acc = accumulator(8 // world_size() // k, gradient_accumulation_steps=k)
        probe = Probe(acc, SwallowsKwargs())
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(probe.model(**batch), reduction="mean")
            norms.append(probe.step().grad_norm)
    exact = big_batch(make_model("llama"), rows)[1]
    return {"norms": norms, "exact": sum((g**2).sum().item() for g in exact.values()) ** 0.5}


def _regression(loss: Callable[[torch.Tensor], tuple[torch.Tensor, str]]) -> dict[str, Any]:
    """Squared error of y = x.w over 13 samples at B_eff 8: the gradient by hand, in float64."""
    x = torch.randn(13, 3, generator=torch.Generator().manual_seed(1))
    y = torch.randn(13, generator=torch.Generator().manual_seed(2))
    data = torch.utils.data.TensorDataset(x, y)
    acc = accumulator(2, global_batch_size=8)
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    probe = Probe(acc, model)
    errors = []
    windows = acc.windows(data, count_targets=lambda batch: len(batch[1]))
    for window, indices in zip(windows, windows_of(global_order(13, 0, 0), 8), strict=True):
        wx, wy = x[indices].double(), y[indices].double()
        exact = (
            2 * ((wx @ probe.weights()["weight"].double().T).squeeze(1) - wy) @ wx / len(indices)
        )
        for bx, by in window:
            with acc.accumulate(probe.model):
                value, reduction = loss((probe.model(bx).squeeze(1) - by) ** 2)
                acc.backward(value, reduction=reduction)
        probe.step()
        errors.append(
            ((probe.stepped[-1]["weight"][0].double() - exact).norm() / exact.norm()).item()
        )
    return {"errors": errors}


@case
def i4_own_loss_as_sum() -> dict[str, Any]:
    return _regression(lambda squares: (squares.sum(), "sum"))


@case
def i4_own_loss_as_mean() -> dict[str, Any]:
    return _regression(lambda squares: (squares.mean(), "mean"))


@case
def i8_sum_of_weights_is_the_denominator() -> dict[str, Any]:
    """Loss sum(w_i * v * x_i) / sum(w_i) has the gradient sum(w_i x_i) / sum(w_i): by hand."""
    x, w = torch.arange(1.0, 11.0), torch.linspace(0.1, 1.9, 10)
    acc = accumulator(1, global_batch_size=4)
    model = torch.nn.Linear(1, 1, bias=False)
    probe = Probe(acc, model)
    found, exact = [], []
    windows = acc.windows(
        torch.utils.data.TensorDataset(x, w),
        shuffle=False,
        count_targets=lambda batch: float(batch[1].double().sum()),
    )
    for begin, window in zip((0, 4, 8), windows, strict=True):
        for bx, bw in window:
            with acc.accumulate(probe.model):
                acc.backward((bw * probe.model(bx.unsqueeze(1)).squeeze(1)).sum(), reduction="sum")
        probe.step()
        found.append(probe.stepped[-1]["weight"].item())
        wx, ww = x[begin : begin + 4].double(), w[begin : begin + 4].double()
        exact.append(((wx * ww).sum() / ww.sum()).item())
    return {"found": found, "exact": exact}


@case
def i5_splits_log_the_same_loss() -> dict[str, Any]:
    rows, curves = make_rows(40), []
    for micro in (8, 4, 2, 1):
        if micro * world_size() > 8:
            continue
        acc = accumulator(micro, global_batch_size=8)
        probe = Probe(acc, make_model("llama"))
        curves.append([])
        for window in acc.windows(rows, collate_fn=pad, lengths=lengths(rows)):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            curves[-1].append(probe.step().loss)
    return {"curves": curves}


@case
def i10_no_target_anywhere() -> dict[str, Any]:
    """Windows of 4: the first has targets on one row only, the second none at all, the third is
    ordinary."""
    rows = make_rows(12, all_masked=(0, 1, 2, 4, 5, 6, 7))
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, make_model("llama"), schedule=lambda update: 1 / (1 + update))
    scheduler = acc.prepare(probe.scheduler)
    results = []
    exact = []
    for index, window in enumerate(acc.windows(rows, collate_fn=pad, shuffle=False)):
        before = probe.weights()
        exact.append(None if index == 1 else probe.exact(rows[index * 4 : index * 4 + 4])[1])
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(probe.model(**batch).loss, reduction="mean")
        update = probe.step(scheduler)
        unchanged = equal(before, probe.weights())
        lr = probe.optimizer.param_groups[0]["lr"]
        results.append([update.step, update.skipped, update.reason, unchanged, lr, probe.left()])
    errors = [relative_error(probe.stepped[i], exact[i]) for i in (0, 2)]
    return {"results": results, "errors": errors}


@case
def i10_a_rank_without_targets_under_the_models_own_mean() -> dict[str, Any]:
    """The last rank's rows have no target, so that the model's own mean there is nan."""
    rows = make_rows(8)
    if world_size() > 1:
        for row in rows[4:]:
            row["labels"] = [IGNORE] * len(row["labels"])
    mine = rows[rank() * 4 : rank() * 4 + 4] if world_size() > 1 else rows
    acc = accumulator(2, gradient_accumulation_steps=len(mine) // 2)
    probe = Probe(acc, make_model("llama"))
    batches = [pad(mine[begin : begin + 2]) for begin in range(0, len(mine), 2)]
    return compare(probe, acc.windows(iter(batches)), [rows], models_own_mean)


@case
def masked_prompt_of_first_label_is_not_counted() -> dict[str, Any]:
    """A row whose only label stands on its first token has no target: nothing predicts a first
    token."""
    rows = [*make_rows(7), {"input_ids": [5, 6, 7], "labels": [5, IGNORE, IGNORE]}]
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("gpt2"))
    return compare(probe, acc.windows(rows, collate_fn=pad), [rows])


@case
def i7_label_smoothing() -> dict[str, Any]:
    """By the definition: (1 - s) * nll + s * mean over the vocabulary of -log p, in float64."""
    rows, smoothing = make_rows(10), 0.1
    acc = accumulator(2, global_batch_size=10 if world_size() == 1 else 12)
    probe = Probe(acc, make_model("llama"))
    exact_model = copy.deepcopy(probe.pristine).double()
    batch = pad(rows)
    log_p = (
        exact_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1]
        .log_softmax(-1)
    )
    labels = batch["labels"][:, 1:]
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    ((each * (labels != IGNORE)).sum() / num_targets(rows)).backward()
    exact = {name: p.grad for name, p in exact_model.named_parameters()}
    for window in acc.windows(rows, collate_fn=pad):
        for part in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, part, label_smoothing=smoothing))
        probe.step()
    return {"errors": [relative_error(probe.stepped[-1], exact)]}


@case
def i9_each_term_of_two() -> dict[str, Any]:
    """Loss sum(w x) over samples, and a term 100 w x_k of each micro-batch k: 101 times the
    mean."""
    values = torch.arange(1.0, 12.0)  # windows of 4, 4 and 3 micro-batches of one sample
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, Slope())
    for window in acc.windows(DataLoader(values, batch_size=1), count_targets=len):
        for x in window:
            with acc.accumulate(probe.model):
                out = probe.model(torch.stack([x, 100 * x]))
                acc.backward(out[0].sum(), reduction="sum", auxiliary=out[1].mean())
        probe.step()
    return {"gradients": [g["w"].item() for g in probe.stepped]}


@case
def logits_at_targets_in_chunks() -> dict[str, Any]:
    """Each path of the loss, with chunks of four targets: ranks make different numbers of chunks,
    and one makes none."""
    from peft import LoraConfig, get_peft_model

    rows = make_rows(13, all_masked=(2, 3, 8))
    head_too = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    models = {
        "llama": make_model("llama"),
        "gpt2": make_model("gpt2"),  # embeddings tied to the head
        "lora": make_model("lora"),
        "lora on the head": get_peft_model(make_model("llama"), head_too),
        "turned off": make_model("llama"),
    }
    result = {}
    before, chunked.CHUNK = chunked.CHUNK, 4 * 97
    try:
        for name, model in models.items():
            acc = accumulator(2, global_batch_size=8)
            probe = Probe(acc, model)
            if name == "turned off":
                head.decide_loss_path(probe.model, None, "off")
            found = compare(
                probe, acc.windows(rows, collate_fn=pad, shuffle=False), [rows[:8], rows[8:]]
            )
            path = head.decide_loss_path(probe.model, None).path
            result[name] = {"path": path, "errors": found["errors"] + found["loss_errors"]}
    finally:
        chunked.CHUNK = before
    return result
