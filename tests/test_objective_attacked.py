"""Loops and models that once made an update wrong in silence, or waited for each other for ever.

Each is exact against one float64 big batch now, or refused in words that name the remedy.
"""

from __future__ import annotations

import copy
import gc
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accum_trainer import AccumTrainerError, Accumulator, DataError, EngineError, causal_lm_loss
from accum_trainer.losses.objective import find_objective
from accum_trainer.losses.probe import length_of
from benchmarks.families_models import FAMILIES
from benchmarks.families_rows import IGNORE
from tests.launching import torchrun

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def family(name: str, kind: str = "causal"):
    return next(f for f in FAMILIES if (f.name, f.kind) == (name, kind))


def run(model, batches, loss, during=None, **options):
    """One window of these micro-batches; the update and the gradient that it stepped with."""
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=len(batches), cpu=True)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    found: dict[str, torch.Tensor] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    sgd.register_step_pre_hook(
        lambda *_: found.update(
            {
                names[id(p)]: p.grad.clone()
                for p in sgd.param_groups[0]["params"]
                if p.grad is not None
            }
        )
    )
    ready, optimizer = acc.prepare(model, sgd)
    for window in acc.windows(iter(batches), **options):
        for batch in window:
            with acc.accumulate(ready):
                acc.backward(*loss(ready, batch))
                if during is not None:
                    during(ready)
        return acc.step(optimizer), found


def own(model, batch):
    return (model(**batch).loss,)


def ours(model, batch):
    return (causal_lm_loss(model, batch),)


def llama_batches(count: int = 2):
    kind = family("Llama")
    rows = kind.rows(2 * count)
    return [kind.collate(rows[2 * i : 2 * i + 2]) for i in range(count)]


# --- the model runs on other targets than were counted, or is asked for another loss ---


def masked_anew(model, batch):
    return (
        model(
            **{**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] < 40, IGNORE)}
        ).loss,
    )


def masked_anew_ours(model, batch):
    return (
        causal_lm_loss(
            model, {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] < 40, IGNORE)}
        ),
    )


def masked_in_place(model, batch):
    batch["labels"][:, ::2] = IGNORE
    return own(model, batch)


def without_a_row(model, batch):
    return own(model, {key: value[:1] for key, value in batch.items()})


def without_labels(model, batch):
    loss = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=None
    ).loss
    return (loss if loss is not None else model(**batch).loss / 2,)


def in_place(make):
    def loss(model, batch):
        (value,) = make(model, batch)
        value /= 4
        return (value,)

    return loss


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (masked_anew, "the model ran on .* were counted in the micro-batch before"),
        (masked_anew_ours, "causal_lm_loss ran on .* were counted in the micro-batch before"),
        (masked_in_place, "the model ran on .* Change them in collate_fn"),
        (without_a_row, "the model ran on .* the loop changed labels or samples"),
        (in_place(own), "the model's own loss, divided or multiplied by a number"),
        (in_place(ours), "neither causal_lm_loss nor what the model returned, unchanged"),
        (without_labels, "the model's own loss, divided or multiplied by a number"),
        (lambda m, b: (m(**b, num_items_in_batch=30).loss,), "called with num_items_in_batch"),
        (
            lambda m, b: (m(**b, shift_labels=b["labels"].roll(-1, 1)).loss,),
            "called with shift_labels",
        ),
    ],
)
def test_i38_loss_of_other_targets_than_were_counted_is_refused(loss, says):
    with pytest.raises((AccumTrainerError, DataError), match=says):
        run(family("Llama").build(), llama_batches(), loss)


def test_labels_that_are_copied_and_not_changed_are_fine():
    kind, batches = family("Llama"), llama_batches()
    copied, _ = run(
        kind.build(), batches, lambda m, b: own(m, {k: v.clone() for k, v in b.items()})
    )
    plain, _ = run(kind.build(), batches, own)
    by_position, _ = run(
        kind.build(),
        batches,
        lambda m, b: (m(b["input_ids"], b["attention_mask"], labels=b["labels"]).loss,),
    )
    assert copied.loss == plain.loss == by_position.loss


def test_i38_count_that_does_not_fit_is_refused_for_our_loss_too():
    def unshifted(batch):
        return int((batch["labels"] != IGNORE).sum())

    with pytest.raises(DataError, match="count_targets counts otherwise"):
        run(family("Llama").build(), llama_batches(), ours, count_targets=unshifted)
    with pytest.raises(AccumTrainerError, match="pass the count_targets that fits"):
        run(family("Llama").build(), llama_batches(), own, count_targets=unshifted)


# --- a first batch on which any weight would cancel out ---


class Classifier(nn.Module):
    """Classifies single numbers; each class has its own weight in the loss."""

    def __init__(self, zero: bool = False, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.weight = torch.tensor([0.1, 1.0, 2.0, 5.0]) if weight is None else weight
        if zero:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {
            "loss": F.cross_entropy(logits, labels, weight=self.weight.to(logits.dtype)),
            "logits": logits,
        }


def of_classes(*labels: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(len(labels), 3), "labels": torch.tensor(labels)}


@pytest.mark.parametrize("labels", [(2,), (2, 2), (0, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i38_class_weights_are_found_on_any_first_batch(labels, zero, dtype):
    batch = of_classes(*labels)
    batch["x"] = batch["x"].to(dtype)
    for weight, reduction in ((None, ""), (torch.ones(4), "mean")):
        objective = find_objective(Classifier(zero, weight).to(dtype), batch)
        if reduction and dtype == torch.bfloat16:
            continue  # 16-bit halves may round too coarsely to prove it: refused, not wrong
        assert objective.reduction == reduction, objective


def test_i38_loss_that_leaves_out_class_0_is_found_with_one_sample():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 7)

        def forward(self, input_ids, labels=None):
            logits = self.table(input_ids)
            return {
                "loss": F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0
                )
            }

    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 1, 0, 0]]),
        "labels": torch.tensor([[3, 4, 5, 1, 0, 0]]),
    }
    assert not find_objective(Padded(), batch).reduction


# --- padding that changes the loss ---


def padded_left(samples):
    longest = max(len(s["input_ids"]) for s in samples)

    def filled(key, value):
        return torch.stack(
            [F.pad(s[key], (longest - len(s[key]), 0), value=value) for s in samples]
        )

    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": mask,
        "labels": filled("labels", IGNORE),
    }


def no_mask(collate):
    return lambda samples: {
        key: v for key, v in collate(samples).items() if key != "attention_mask"
    }


def sounds_of_unequal_length(samples):
    longest = max(len(s["input_values"]) for s in samples)
    return {
        "input_values": torch.stack(
            [F.pad(s["input_values"], (0, longest - len(s["input_values"]))) for s in samples]
        ),
        "labels": torch.stack([s["labels"] for s in samples]),
    }


def all_targets(rows):
    return [{**row, "labels": row["input_ids"]} for row in rows]


def unequal(rows):
    return [
        {**row, "input_values": row["input_values"][: 400 - 60 * i]} for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("name", "kind", "collate", "change", "says"),
    [
        ("GPT-2", "causal", padded_left, None, "padding changes this model's own loss"),
        (
            "Llama",
            "causal",
            padded_left,
            all_targets,
            "a row is padded on the left and the label of its first token",
        ),
        (
            "T5",
            "encoder-decoder",
            no_mask(family("T5", "encoder-decoder").collate),
            None,
            "padding changes",
        ),
        (
            "BERT",
            "one class",
            no_mask(family("BERT", "one class").collate),
            None,
            "padding changes",
        ),
        (
            "wav2vec2",
            "sounds",
            sounds_of_unequal_length,
            unequal,
            "padding changes this model's own loss",
        ),
    ],
)
def test_padding_that_changes_the_loss_is_refused_where_batches_differ(
    name, kind, collate, change, says
):
    found = family(name, kind)
    rows = found.rows(4)
    rows = change(rows) if change else rows
    batches = [collate(rows[:2]), collate(rows[2:])]
    assert length_of(batches[0]) != length_of(batches[1])
    with pytest.raises(DataError, match=says):
        run(found.build(), batches, own)


def test_padding_on_the_left_is_exact_where_first_labels_are_masked():
    kind = family("Llama")
    rows = [
        {**row, "labels": torch.cat([torch.tensor([IGNORE]), row["labels"][1:]])}
        for row in kind.rows(4)
    ]
    model = kind.build()
    exact = copy.deepcopy(model).double()
    exact(**kind.collate(rows)).loss.backward()
    _, found = run(model, [padded_left(rows[:2]), padded_left(rows[2:])], own)
    off = sum(
        ((found[n].double() - p.grad) ** 2).sum()
        for n, p in exact.named_parameters()
        if p.grad is not None
    )
    size = sum((p.grad**2).sum() for p in exact.parameters() if p.grad is not None)
    assert float((off / size).sqrt()) < 2e-6


# --- BatchNorm that wakes up, several loaders, a router ---


def test_batch_norm_that_is_switched_on_in_the_loop_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, cpu=True)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(EngineError, match="BatchNorm modules in train mode"):
        for window in acc.windows(iter([torch.randn(2, 3)] * 2), count_targets=len):
            model.train()
            for x in window:
                with acc.accumulate(model):
                    acc.backward(model(x).sum(), reduction="sum")
            acc.step(optimizer)


def test_each_loader_has_an_objective_of_its_own():
    """A count passed with one loader does not apply to the other; the mean loss, by hand."""
    model = Classifier(weight=torch.ones(4))
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, cpu=True)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with_gap = [of_classes(1, 2), {**of_classes(3, 0), "labels": torch.tensor([3, IGNORE])}]

    def loss_of(batches, **options):
        for window in acc.windows(iter(batches), **options):
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(model(**batch)["loss"])
            return acc.step(optimizer).loss

    loss_of([of_classes(0, 1), of_classes(2, 3)], count_targets=lambda batch: len(batch["x"]))
    terms = [
        F.cross_entropy(model.linear(b["x"]), b["labels"], reduction="sum").item() for b in with_gap
    ]
    assert loss_of(with_gap) == pytest.approx(sum(terms) / 3, rel=1e-6)


def test_router_that_cannot_be_weighed_apart_is_refused():
    kind = family("Mixtral, router")
    rows = kind.rows(4)
    batches = [kind.collate(rows[:2]), kind.collate(rows[2:])]
    with pytest.raises(AccumTrainerError, match="which this call does not return separately"):
        run(kind.build(), batches, lambda m, b: (m(**b, return_dict=False)[0],))
    silent = kind.build()
    silent.config.output_router_logits = False
    with pytest.raises(AccumTrainerError, match="called with output_router_logits"):
        run(silent, batches, lambda m, b: (m(**b, output_router_logits=True).loss,))
    with pytest.raises(AccumTrainerError, match="names no coefficient"):
        run(Nameless(), batches, ours)


class Nameless(nn.Module):
    """Returns a router's loss and names no coefficient."""

    def __init__(self):
        super().__init__()
        self.model = family("Llama").build()

    def forward(self, input_ids, attention_mask):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=logits, aux_loss=logits.square().mean())


# --- what is right and was refused ---


def test_the_users_word_counts_where_nothing_can_be_proven():
    """A batch that is a tuple: the gradient is that of the mean over all samples, by hand."""

    class Fit(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x, y):
            return ((x * self.w - y) ** 2).mean()

    x, y = torch.arange(1.0, 6.0), torch.ones(5)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    _, found = run(Fit(), batches, lambda m, b: (m(*b), "mean"), count_targets=lambda b: len(b[0]))
    assert found["w"].item() == pytest.approx(-2 * 15 / 5)
    with pytest.raises(
        AccumTrainerError, match='say reduction="mean" or reduction="sum" if you know'
    ):
        run(Fit(), batches, lambda m, b: (m(*b),), count_targets=lambda b: len(b[0]))


@pytest.mark.parametrize("more", [{"use_cache": False}, {"note": "text"}])
def test_first_batch_of_one_sample_with_what_is_no_tensor(more):
    batch = {key: value[:1] for key, value in llama_batches()[0].items()}
    objective = find_objective(AcceptsAll(family("Llama").build()), {**batch, **more})
    assert objective.describe().startswith("mean over shifted labels")


class AcceptsAll(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.loss_function = model, model.config, model.loss_function

    def forward(self, note=None, **inputs):
        return self.model(**inputs)


def test_compiled_model_is_proven_like_another():
    model = torch.compile(family("Llama").build(), backend="eager")
    assert (
        find_objective(model, llama_batches()[0]).describe().startswith("mean over shifted labels")
    )


def test_scheduler_of_another_time_that_goes_away_is_no_fault():
    model = Classifier(weight=torch.ones(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    old.itself = old  # a cycle, so that it lives until a collection
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=3, cpu=True)
    model, prepared = acc.prepare(model, optimizer)
    for window in acc.windows(iter([of_classes(0, 1)] * 3)):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(**batch)["loss"])
            old = None
            gc.collect()
        acc.step(prepared)
    assert acc.num_updates == 1


# --- ranks ---


def test_i47_what_one_rank_finds_before_the_first_window_ends_all(tmp_path):
    result = torchrun(2, "tests.first_window", tmp_path, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert "KeyError: 'nothing of this name'" in found["a count that raises"]
        assert "process 1 has no batch at all while others have" in found["a rank without data"]


def test_evaluation_in_inference_mode_between_windows():
    kind, batches = family("Llama"), llama_batches()
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=1, cpu=True)
    plain = kind.build()
    model, optimizer = acc.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.0))
    losses = []
    for window in acc.windows(iter(batches)):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(**batch).loss)
        losses.append(acc.step(optimizer).loss)
        with torch.inference_mode():
            assert model(**batches[len(losses) - 1]).loss.item() == pytest.approx(
                losses[-1], rel=1e-6
            )
            causal_lm_loss(model, batches[0])
    assert len(losses) == 2


def test_router_of_another_call_is_not_taken_for_this_loss():
    """A forward for metrics is not the loss; of two under autograd, either could be."""
    kind = family("Mixtral, router")
    rows = kind.rows(4)
    batches = [kind.collate(rows[:2]), kind.collate(rows[2:])]

    def measured_after(model, batch):
        loss = causal_lm_loss(model, batch)
        with torch.no_grad():
            model(**batches[0])
        return (loss,)

    def twice(model, batch):
        loss = causal_lm_loss(model, batch)
        return (loss, "sum") if model(**batch).loss is not None else ()

    plain, expected = run(kind.build(), batches, ours)
    measured, found = run(kind.build(), batches, measured_after)
    assert measured.loss == plain.loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(AccumTrainerError, match="the model ran 2 times in this micro-batch"):
        run(kind.build(), batches, twice)
