"""Logits only where there are targets: loss and gradient of the full logits, in less memory.

Tolerance: relative 2e-6 against one float64 big batch; in bf16, the error of the plain path."""

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
from accum_trainer.losses import chunked, patched_head
from accum_trainer.losses.head import LossPath, decide_loss_path, set_loss_path
from accum_trainer.losses.patched_head import CHUNKED, PLAIN, SELECTED
from accum_trainer.losses.targets import labels_on_host, note_move
from tests.reference import (
    IGNORE,
    VOCABULARY,
    big_batch,
    make_model,
    make_rows,
    num_targets,
    pad,
    relative_error,
)
from tests.test_structure import imports_of

EXACT = 2e-6
# The third row has no target; the others have random prompts and lengths.
ROWS = make_rows(6, all_masked=(2,))
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OWN_SIZES = {
    "GPT2": dict(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0),
    "Bloom": dict(n_layer=2, n_head=2),
    "Gemma2": dict(head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0),
    "Mixtral": dict(
        num_local_experts=4, experts_implementation="eager"
    ),  # the fused experts take no float64
    "Granite": dict(logits_scaling=8.0),
}
PATHS = {
    "Llama": CHUNKED,
    "GPT2": CHUNKED,
    "Qwen2": CHUNKED,
    "Gemma2": SELECTED,
    "OPT": CHUNKED,
    "Phi3": CHUNKED,
    "Mixtral": CHUNKED,
    "GPTNeoX": CHUNKED,
    "Bloom": CHUNKED,
    "Phi": CHUNKED,  # its head has a bias
    "Granite": SELECTED,
}


def make(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | OWN_SIZES.get(name, {})))
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(
        config
    )
    with torch.no_grad():  # larger weights, so that logits and soft caps are not nearly linear
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.train()


def gradient(
    model: torch.nn.Module, rows: list[dict] = ROWS, **options: float
) -> tuple[float, dict]:
    """Summed loss of `rows` and its gradient by name."""
    model.zero_grad()
    loss = causal_lm_loss(model, pad(rows), **options)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def forced(model: torch.nn.Module, path: str) -> torch.nn.Module:
    set_loss_path(model, LossPath(path, "by the test"))
    return model


def path_of(model: torch.nn.Module) -> str:
    return decide_loss_path(model, torch.tensor([[5, 6, 7]])).path


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three targets."""
    monkeypatch.setattr(chunked, "CHUNK", 3 * VOCABULARY)


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
