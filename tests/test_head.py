"""Logits only where there are targets: loss and gradient of the full logits, in less memory.

Tolerance: relative 2e-6 against one float64 big batch; in bf16, the error of the plain path."""

from __future__ import annotations

import copy

import pytest
import torch

from accum_trainer import causal_lm_loss
from accum_trainer.losses import chunked, patched_head
from accum_trainer.losses.head import decide_loss_path
from accum_trainer.losses.patched_head import CHUNKED, PLAIN, SELECTED
from tests.heads import (
    EXACT,
    PATHS,
    ROWS,
    forced,
    gradient,
    make,
    path_of,
)
from tests.reference import (
    IGNORE,
    VOCABULARY,
    big_batch,
    make_rows,
    num_targets,
    pad,
    relative_error,
)

# --- exactness ---


@pytest.mark.parametrize("name", PATHS)
def test_loss_and_gradient_are_the_big_batchs_on_every_path(name, small_chunks):
    model = make(name)
    assert path_of(model) == PATHS[name]
    exact_loss, exact = big_batch(model, ROWS)
    for path in {PLAIN, SELECTED, PATHS[name]}:
        loss, found = gradient(forced(model, path))
        assert loss / num_targets(ROWS) == pytest.approx(exact_loss, rel=EXACT), path
        assert (
            relative_error({n: g / num_targets(ROWS) for n, g in found.items()}, exact) <= EXACT
        ), path


@pytest.mark.parametrize("path", [PLAIN, SELECTED, CHUNKED])
def test_label_smoothing_by_its_definition(path, small_chunks):
    model, smoothing = forced(make("Llama"), path), 0.1
    batch = pad(ROWS)
    exact_model = copy.deepcopy(model).double()
    logits = exact_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    log_p, labels = logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    exact = (((1 - smoothing) * nll - smoothing * log_p.mean(-1)) * (labels != IGNORE)).sum()
    exact.backward()
    loss, found = gradient(model, label_smoothing=smoothing)
    assert loss == pytest.approx(exact.item(), rel=EXACT)
    assert relative_error(found, {n: p.grad for n, p in exact_model.named_parameters()}) <= EXACT


def test_two_targets_by_hand():
    """Logits (0, 0) and (log 3, 0) for targets 0 and 1: losses log 2 and log 4, slopes (-1/2, 1/2)
    and (3/4, -3/4)."""
    linear = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
    hidden = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).log().nan_to_num(neginf=0.0).requires_grad_()
    loss = chunked.chunked_loss(
        hidden, linear.weight, None, torch.tensor([0, 1]), 0.0, torch.float32
    )
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor([2.0, 4.0]).log().sum().item())
    assert hidden.grad.tolist() == [pytest.approx([-0.5, 0.5]), pytest.approx([0.75, -0.75])]


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_without_a_target_the_loss_is_0_with_every_parameter_in_its_graph(name):
    model = make(name)
    assert path_of(model) == PATHS[name]
    loss, found = gradient(model, make_rows(2, all_masked=(0, 1)))
    assert loss == 0
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in found.values())


class NeverEmpty(torch.nn.Linear):
    """A head that cannot run on nothing, as some kernels cannot."""

    def forward(self, hidden):
        assert hidden.numel()
        return super().forward(hidden)


def test_without_a_target_a_head_of_its_own_kind_still_has_something_to_do():
    model = make("Llama")
    model.lm_head = NeverEmpty(32, VOCABULARY)
    assert path_of(model) == SELECTED
    assert gradient(model, make_rows(2, all_masked=(0, 1)))[0] == 0


def test_packed_samples_and_padding_on_the_left():
    model = make("Llama")
    model.config.use_cache = False
    _, exact = gradient(forced(model, PLAIN), ROWS[:2])
    joined = {
        "input_ids": ROWS[0]["input_ids"] + ROWS[1]["input_ids"],
        "position_ids": [i for row in ROWS[:2] for i in range(len(row["input_ids"]))],
        "labels": [label for row in ROWS[:2] for label in [IGNORE, *row["labels"][1:]]],
    }
    left = {
        key: value.flip(1)
        for key, value in pad([{k: v[::-1] for k, v in row.items()} for row in ROWS[:2]]).items()
    }
    forced(model, CHUNKED)
    for batch in ({key: torch.tensor([value]) for key, value in joined.items()}, left):
        model.zero_grad()
        causal_lm_loss(model, batch).backward()
        assert relative_error({n: p.grad for n, p in model.named_parameters()}, exact) <= EXACT


def test_gradient_checkpointing(small_chunks):
    model = make("Llama")
    _, exact = big_batch(model, ROWS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert path_of(model) == CHUNKED
    _, found = gradient(model)
    assert relative_error({n: g / num_targets(ROWS) for n, g in found.items()}, exact) <= EXACT


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (dict(target_modules="all-linear"), CHUNKED),  # the head stays frozen
        (dict(target_modules=["q_proj", "lm_head"]), SELECTED),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), SELECTED),
    ],
)
def test_lora(options, path, small_chunks):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make("Llama"), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    ).train()
    assert path_of(model) == path
    exact_loss, exact = big_batch(model, ROWS)
    loss, found = gradient(model)
    assert loss / num_targets(ROWS) == pytest.approx(exact_loss, rel=EXACT)
    assert relative_error({n: g / num_targets(ROWS) for n, g in found.items()}, exact) <= EXACT


# --- low precision ---


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("how", ["autocast", "bf16 weights"])
def test_bf16_is_as_near_as_the_plain_path(name, how, small_chunks):
    rows = make_rows(12)
    exact_model = make(name)
    _, exact = big_batch(exact_model, rows)
    errors = {}
    for path in (PLAIN, PATHS[name]):
        model = copy.deepcopy(exact_model)
        model = model.bfloat16() if how == "bf16 weights" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            assert path_of(model) == PATHS[name]
            _, found = gradient(forced(model, path), rows)
        assert all(
            g.dtype == (torch.float32 if how == "autocast" else torch.bfloat16)
            for g in found.values()
        )
        errors[path] = relative_error({n: g / num_targets(rows) for n, g in found.items()}, exact)
    assert errors[PLAIN] > 1e-4
    assert errors[PATHS[name]] <= 1.1 * errors[PLAIN]


def test_heads_gradient_is_added_up_in_float32(monkeypatch):
    """Chunks of one target with gradients 128, then 1 many times: bf16 would stay at 128."""
    monkeypatch.setattr(chunked, "CHUNK", 1)
    linear = torch.nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    linear.weight.grad_dtype = torch.float32
    torch.nn.init.zeros_(
        linear.weight
    )  # softmax is 1/2: the gradient of each target is half of its hidden state
    hidden = torch.tensor([256.0] + [2.0] * 100, dtype=torch.bfloat16).unsqueeze(1)
    chunked.chunked_loss(
        hidden, linear.weight, None, torch.zeros(101, dtype=torch.int64), 0.0, torch.bfloat16
    ).backward()
    assert linear.weight.grad.flatten().tolist() == [-228.0, 228.0]


def test_float16_leaves_the_loss_to_the_loss_scale(monkeypatch):
    model = make("Llama").half()
    found = decide_loss_path(model, torch.tensor([[5, 6, 7]]))
    assert found.path == SELECTED
    assert "float16" in found.reason
    monkeypatch.setattr(patched_head, "chunked_loss", None)
    assert (
        gradient(forced(model, CHUNKED))[0] == gradient(forced(model, SELECTED))[0]
    )  # decided in another precision
