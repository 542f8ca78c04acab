"""Which path a model's loss takes, how it is proven, and the logits that it needs."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import accum_trainer
from accum_trainer import causal_lm_loss
from accum_trainer.losses import chunked
from accum_trainer.losses.head import LossPath, decide_loss_path
from accum_trainer.losses.patched_head import CHUNKED, PLAIN, SELECTED
from accum_trainer.losses.targets import labels_on_host, note_move
from tests.heads import (
    EXACT,
    ROWS,
    forced,
    gradient,
    make,
    path_of,
)
from tests.reference import (
    VOCABULARY,
    make_model,
    make_rows,
    num_targets,
    pad,
    relative_error,
)
from tests.test_structure import imports_of

# --- which path ---


class Wrapped(torch.nn.Module):
    """A model around a Llama, with something done to its logits."""

    def __init__(self, work, own_head: bool = True) -> None:
        super().__init__()
        self.inner, self.work = make("Llama"), work
        self.scale = torch.nn.Parameter(torch.ones(()))
        if own_head:
            self.get_output_embeddings = self.inner.get_output_embeddings

    def forward(self, input_ids, attention_mask=None):
        return self.work(
            self, self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        )


WORK = {
    "nothing": (lambda model, logits: logits, CHUNKED),
    "a factor that is 1 until it is trained": (
        lambda model, logits: logits * model.scale,
        SELECTED,
    ),
    "the same in place": (lambda model, logits: logits.mul_(model.scale), SELECTED),
    "padded classes cut off": (lambda model, logits: logits[..., :90], SELECTED),
    "a bias by position": (
        lambda model, logits: logits + torch.eye(200)[: logits.shape[1], :VOCABULARY],
        PLAIN,
    ),
    "another order": (lambda model, logits: logits.flip(1), PLAIN),
}


@pytest.mark.parametrize("work", WORK)
def test_what_a_model_does_with_its_logits_decides_the_path(work):
    model = Wrapped(WORK[work][0]).train()
    assert path_of(model) == WORK[work][1]
    rows = [{k: [min(t, 89) for t in v] for k, v in row.items()} for row in ROWS]
    loss, found = gradient(model, rows)
    plain_loss, plain = gradient(forced(model, PLAIN), rows)
    assert loss == pytest.approx(plain_loss, rel=EXACT)
    assert relative_error(found, {n: g.double() for n, g in plain.items()}) <= EXACT


def test_a_model_that_names_no_head_takes_the_plain_path_and_says_so():
    model = Wrapped(lambda model, logits: logits, own_head=False)
    found = decide_loss_path(model, torch.tensor([[5]]))
    assert (found.path, found.reason) == (
        PLAIN,
        "Wrapped names no output head (get_output_embeddings)",
    )
    assert found.note == f"loss path plain: {found.reason}"
    assert gradient(model)[0] == pytest.approx(gradient(model.inner)[0], rel=EXACT)


class Functional(torch.nn.Module):
    """A model whose output head is its input embedding, used as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)

    def get_output_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask):
        return self.embedding(input_ids) @ self.embedding.weight.T


def test_a_head_that_is_not_run_and_a_model_that_cannot_be_probed():
    model = Functional()
    assert "attention_mask" in decide_loss_path(model, torch.tensor([[5]])).reason
    assert "forward" not in vars(model.embedding)
    assert gradient(model)[0] > 0
    tolerant = Functional()
    tolerant.forward = lambda input_ids, attention_mask=None: Functional.forward(
        tolerant, input_ids, None
    )
    found = decide_loss_path(tolerant, torch.tensor([[5]]))
    assert (found.path, "not run on hidden states" in found.reason) == (PLAIN, True)


def test_compiled_models_keep_their_head():
    model = make("Llama")
    compiled = torch.compile(model, backend="eager")
    assert decide_loss_path(compiled, None) == LossPath(
        PLAIN, "the model is compiled together with its output head"
    )
    model.lm_head.compile(backend="eager")
    assert decide_loss_path(model, None) == LossPath(PLAIN, "the output head is compiled")


def test_turned_off():
    model = make("Llama")
    assert decide_loss_path(model, None, "off") == LossPath(PLAIN, "asked for")
    assert largest(model, pad(ROWS)) == pad(ROWS)["labels"].numel() * VOCABULARY
    assert path_of(model) == PLAIN


def test_hidden_states_of_another_shape_go_through_as_they_are(small_chunks):
    """Proven on one shape, run on another: the model later drops its last position."""
    model = Wrapped(lambda model, logits: logits)
    assert path_of(model) == CHUNKED
    exact = causal_lm_loss(model, pad(ROWS)).item()
    whole, model.inner.forward = (
        model.inner.forward,
        lambda **inputs: whole(**inputs, logits_to_keep=slice(0, -1)),
    )
    model.work = lambda model, logits: torch.nn.functional.pad(logits, (0, 0, 0, 1))
    assert causal_lm_loss(model, pad(ROWS)).item() == pytest.approx(exact, rel=EXACT)


def test_a_model_around_a_proven_one_and_a_new_head_are_proven_themselves():
    model = Wrapped(lambda model, logits: logits * 0.5)
    assert path_of(model.inner) == CHUNKED
    assert path_of(model) == SELECTED
    model.inner.lm_head = torch.nn.Sequential(model.inner.lm_head)
    assert path_of(model.inner) == SELECTED


def test_the_reference_of_verify_does_not_come_through_here():
    path = Path(accum_trainer.__file__).parent / "verify" / "big_batch.py"
    assert not {"accum_trainer.losses.head", "accum_trainer.losses.causal_lm"} & imports_of(path)


# --- the probe ---


def test_the_probe_leaves_everything_as_it_was():
    model = make("GPT2")
    model.transformer.h[0].eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.rand(1)))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert path_of(model) == CHUNKED
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.lm_head)
    assert len(calls) == 3
    path_of(model)
    assert len(calls) == 3


def test_a_model_that_is_gone_is_forgotten():
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda *_, whole=model: None)  # as ZeRO-3's do
    assert path_of(model) == CHUNKED
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_forward_that_fails_leaves_the_head_as_it_was():
    model = make("Llama")
    assert path_of(model) == CHUNKED
    with pytest.raises(ValueError, match="input_ids"):
        causal_lm_loss(model, pad(ROWS) | {"input_ids": None})
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_a_gradient(mode, monkeypatch):
    monkeypatch.setattr(chunked, "add_product", None)  # nothing is computed for a backward
    model = make("Llama").eval()
    with mode():
        loss = causal_lm_loss(model, pad(ROWS))
    assert path_of(model) == CHUNKED
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(gradient(forced(model, PLAIN))[0], rel=EXACT)


def test_a_graph_that_is_kept_gives_the_gradient_twice():
    model = make("Llama")
    _, once = gradient(model)
    model.zero_grad()
    loss = causal_lm_loss(model, pad(ROWS))
    (loss * 0.25).backward(retain_graph=True)
    (loss * 0.75).backward()
    assert (
        relative_error(
            {n: p.grad for n, p in model.named_parameters()},
            {n: g.double() for n, g in once.items()},
        )
        < 1e-6
    )


# --- memory ---


class LargestLogits(TorchDispatchMode):
    """Size of the largest tensor over the vocabulary, forward or backward, without weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {
            shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])
        }
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if (
                isinstance(tensor, torch.Tensor)
                and VOCABULARY in tensor.shape
                and tuple(tensor.shape) not in self.weights
            ):
                self.numbers = max(self.numbers, tensor.numel())
        return outputs


def largest(model: torch.nn.Module, batch: dict) -> int:
    with LargestLogits(model) as seen:
        causal_lm_loss(model, batch).backward()
    return seen.numbers


def test_logits_are_as_many_as_the_path_says(small_chunks):
    """All positions; the targets; a bound that does not grow with the targets."""
    rows = make_rows(32, longest=60)
    batch, model = pad(rows), make("Llama")
    whole, at_targets = batch["labels"].numel() * VOCABULARY, num_targets(rows) * VOCABULARY
    assert at_targets < whole / 2
    assert largest(forced(model, PLAIN), batch) == whole
    assert largest(forced(model, SELECTED), batch) == at_targets
    assert largest(forced(model, CHUNKED), batch) == chunked.CHUNK == 3 * VOCABULARY


def test_shapes_without_values_count_every_position():
    """A memory plan runs on fake tensors, whose labels have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = make_model("llama")
        batch = {
            "input_ids": torch.ones(2, 8, dtype=torch.int64),
            "labels": torch.ones(2, 8, dtype=torch.int64),
        }
        assert path_of(model) == CHUNKED
        causal_lm_loss(model, batch).backward()
        assert model.lm_head.weight.grad.shape == (VOCABULARY, 32)


def test_labels_are_read_on_the_host_only_as_they_were_handed_out():
    """A copy's values come from what it was copied from; after a change in place, or for another
    tensor, they have to be looked at where they are."""
    host = {"labels": torch.tensor([[1, -100, 2]])}
    device = {"labels": host["labels"].clone()}
    note_move(host, device)
    assert labels_on_host(device["labels"]).tolist() == [[1, -100, 2]]
    assert labels_on_host(host["labels"]) is None
    assert labels_on_host(device["labels"].clone()) is None
    device["labels"][0, 0] = -100
    assert labels_on_host(device["labels"]) is None
    note_move([host], device)  # batches of other kinds have no labels by name
    note_move({}, device)
