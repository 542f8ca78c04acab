"""Packed samples never see each other on any family; otherwise the proof finds it and refuses.

Tolerance: relative 2e-6 against each sample alone in float64, as everywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accum_trainer import Accumulator, ConfigError, TrainConfig
from accum_trainer.batch import BOUNDARIES, halve
from accum_trainer.losses.packing import find_packing
from accum_trainer.sources.collating import PackingCollator
from accum_trainer.speed.cutting import Layout, decide_layout
from tests.packed_families import (
    EXACT,
    FAMILIES,
    KEEPS_APART,
    ROWS,
    TOKENS,
    gradient_apart,
    gradient_packed,
    make,
)
from tests.reference import relative_error


def find(model: torch.nn.Module, **options):
    return find_packing(model, TOKENS, **({"most": 80} | options))


# --- the proof ---


@pytest.mark.parametrize("name", FAMILIES)
def test_i40_the_proof_holds_where_the_packed_gradient_is_each_samples_own(name):
    model = make(name)
    error = relative_error(gradient_packed(model), gradient_apart(model))
    assert (error <= EXACT) == (name in KEEPS_APART), error
    for backward in (True, False):
        found = find(model, backward=backward)
        assert found.holds == (error <= EXACT), (found, error)
    sixteen = find(make(name).bfloat16())
    assert sixteen.holds == (error <= EXACT), (sixteen, error)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mistral", "GPTNeo"])
def test_i41_with_a_cache_the_proof_holds_only_without_it(name):
    model = make(name)
    model.config.use_cache = True
    assert not find(model).holds
    found = find(model, boundaries=())
    assert found.holds and found.without_cache
    # causal_lm_loss leaves the cache out of a packed row.
    assert relative_error(gradient_packed(model), gradient_apart(model)) <= EXACT


def test_i40_a_layer_behind_weights_that_are_still_zero_is_seen():
    """Some models start with output projections of 0: only their gradient, and no logit, depends
    on the convolution."""
    model = make("Lfm2")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("out_proj.weight"):
                p.zero_()
    found = find(model)
    assert not found.holds and "gradient changes by" in found.reason
    model = make("Llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert find(model).holds
    assert "all its logits are 0" in find(model, backward=False).reason


def test_i40_the_proof_leaves_no_trace():
    model = make("GPT2")
    model.transformer.h[0].eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("same", torch.ones(1).expand(7))

    def count(module, args):
        module.calls.add_(1)

    model.register_forward_pre_hook(count)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert find(model).holds
    assert torch.equal(torch.rand(3), expected)
    assert [
        module.training for module in model.modules()
    ] == modes and model.is_gradient_checkpointing
    assert model.calls == 0 and all(p.grad is None for p in model.parameters())


class Convolution(torch.nn.Module):
    """A causal convolution over the last four tokens; those of other samples count 0 if it gets
    `seq_idx`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256, bias=False)
        self.taps = torch.nn.Parameter(torch.randn(4, 16))
        self.given: list[tuple[str, ...]] = []

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids=None, attention_mask=None, seq_idx=None):
        self.given.append(() if seq_idx is None else ("seq_idx",))
        hidden = self.embed(input_ids)
        length, sum_ = hidden.shape[1], hidden * self.taps[0]
        for back in range(1, 4):
            shifted = torch.nn.functional.pad(hidden, (0, 0, back, 0))[:, :length]
            if seq_idx is not None:
                before = torch.nn.functional.pad(seq_idx, (back, 0), value=-1)[:, :length]
                shifted = shifted * (before == seq_idx).unsqueeze(-1)
            sum_ = sum_ + shifted * self.taps[back]
        return SimpleNamespace(logits=self.head(torch.tanh(sum_)))


def test_i40_a_convolution_is_given_each_tokens_sample():
    model = Convolution()
    found = find(model)
    assert found.holds and found.boundaries == ("seq_idx",)  # only what it accepts
    assert relative_error(gradient_packed(model, found.boundaries), gradient_apart(model)) <= EXACT
    assert relative_error(gradient_packed(model), gradient_apart(model)) > 0.01
    assert find(model, boundaries=("seq_idx",)) is found  # decided once
    as_given = find(model, boundaries=())
    assert not as_given.holds and as_given.remedy == ("seq_idx",)
    assert find(Convolution(), boundaries=("seq_idx",)).holds


class LeakyBackward(torch.autograd.Function):
    """The identity, whose gradient also reaches the position before."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-3 * gradient.roll(-1, 1)


def test_i40_a_backward_that_contradicts_its_forward_is_seen():
    model = make("Llama").bfloat16()
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: LeakyBackward.apply(output)
    )
    assert find(model, backward=False).holds
    assert "has a gradient at the sample before it" in find(model).reason


class NoPositions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 8)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.embed(input_ids))


def test_i40_a_model_without_positions_cannot_be_packed():
    assert find(NoPositions()).reason == "its forward takes no position_ids"


# --- the boundaries ---


def test_boundaries_are_those_of_transformers():
    from transformers import DataCollatorWithFlattening

    theirs = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt"
    )([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS])
    ours = PackingCollator(BOUNDARIES)(ROWS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert type(value) is type(ours[name]), name
        if isinstance(value, torch.Tensor):
            assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name
        else:
            assert value == ours[name], name
    assert set(PackingCollator(("seq_idx",))(ROWS)) == {
        "input_ids",
        "labels",
        "position_ids",
        "seq_idx",
    }
    with pytest.raises(
        ConfigError, match="holds 'cu_seqlens'; give some of cu_seq_lens_q, cu_seq_lens_k"
    ):
        PackingCollator(("cu_seqlens",))


def test_halves_of_a_packed_row_have_boundaries_of_their_own():
    samples = [
        {"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in (5, 2, 4, 3)
    ]
    first, second = halve(PackingCollator(BOUNDARIES)(samples))
    expected = [([0, 5, 7], 5, [0] * 5 + [1] * 2), ([0, 4, 7], 4, [0] * 4 + [1] * 3)]
    for half, (ends, longest, number) in zip((first, second), expected, strict=True):
        assert half["cu_seq_lens_q"].tolist() == half["cu_seq_lens_k"].tolist() == ends
        assert half["max_length_q"] == half["max_length_k"] == longest
        assert half["seq_idx"].tolist() == [number]
        assert {half[name].dtype for name in ("cu_seq_lens_q", "seq_idx")} == {torch.int32}
    assert second["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 3]]


# --- train decides by the proof ---


class FewRows(list):
    def __init__(self) -> None:
        super().__init__(ROWS)
        self.lengths = torch.tensor([len(row["input_ids"]) for row in ROWS]).numpy()


def layout_of(network: torch.nn.Module, **options) -> Layout:
    accumulator = Accumulator(micro_batch_size=4, cpu=True)
    prepared = accumulator.prepare(network)
    return decide_layout(TrainConfig(**options), accumulator, prepared, FewRows())


def test_i40_layout_is_decided_by_the_proof(fresh_accelerate):
    proven = "logits and gradient of packed samples are those of each alone"
    assert layout_of(make("Llama"), layout="packed") == Layout(True, f"asked for; proven: {proven}")
    assert layout_of(make("Llama"), layout="padded") == Layout(False, "asked for")
    assert layout_of(make("Llama")) == Layout(
        True, f"packed_sdpa computes no attention between samples; proven: {proven}"
    )
    eager = make("Llama")
    eager.set_attn_implementation("eager")
    assert layout_of(eager).reason.startswith("eager attention would compute, and mask, all pairs")
    with pytest.raises(
        ConfigError,
        match=r"layout=packed cannot be used with model=x, whose packed samples see each .*use",
    ):
        layout_of(make("Lfm2"), layout="packed", model="x")
    # Its attention adds to the mask, which `packed_sdpa` does not make; sdpa keeps samples apart.
    doge = make("Doge")
    assert layout_of(doge, layout="packed") == Layout(True, f"asked for; proven: {proven}")
    assert doge.config._attn_implementation == "sdpa"  # noqa: SLF001
    found = layout_of(make("Doge"))
    assert not found.packed and "too many indices" in found.reason
    mamba = make("Mamba2")
    # It has no attention; this is the default of similar models on a GPU.
    mamba.config._attn_implementation = "flash_attention_2"  # noqa: SLF001
    found = layout_of(mamba)
    assert not found.packed and found.reason.startswith(
        "packed samples would see each other: logits of a packed sample"
    )
