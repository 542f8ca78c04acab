"""Attention inside samples: exact on every family that runs sdpa, and no pair of two samples is
computed.

Tolerance: relative 2e-6 against each sample alone in float64, with transformers' own attention."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from accum_trainer.lm import packed_attention
from accum_trainer.lm.packed_attention import PACKED_SDPA, attend_inside_samples
from accum_trainer.losses.packing import find_packing
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from tests.engine.cases.reads import Reads
from tests.packed_families import EXACT, FAMILIES, ROWS, TOKENS, gradient_apart, gradient_packed
from tests.packed_families import make as make_any
from tests.reference import relative_error

# Families whose attention transformers runs as sdpa, so that ours can take its place.
WITH_SDPA = ["Llama", "GPT2", "Qwen2", "Gemma3Text", "Mistral", "Mixtral", "GPTNeoX", "Phi3"]
WITH_SDPA += ["Lfm2", "FalconH1", "Qwen3Next", "OPT", "Doge"]


def make(name: str, **options) -> torch.nn.Module:
    """With random weights large enough that a wrong mask shows."""
    model = make_any(name, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
    return model


@pytest.fixture
def calls(monkeypatch):
    """(samples, tokens of each) of every call of torch's attention on a packed row."""
    found = []

    def counted(query, *arguments, **options):
        found.append((query.shape[0], query.shape[2]))
        return scaled_dot_product_attention(query, *arguments, **options)

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", counted)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_i40_the_gradient_is_each_samples_own_or_the_proof_refuses(name):
    model = make(name)
    apart = gradient_apart(model)
    switched = attend_inside_samples(model)
    assert switched == (model.config._attn_implementation == PACKED_SDPA)  # noqa: SLF001
    assert switched or name not in WITH_SDPA
    if switched:
        error = math.inf
        with contextlib.suppress(IndexError):  # Doge adds to the mask, and ours is none
            error = relative_error(gradient_packed(model), apart)
        found = find_packing(model, TOKENS, most=80)
        assert found.holds == (error <= EXACT), (found, error)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
def test_no_pair_of_different_samples_is_computed(name, calls):
    """Grouped heads, a window that no sample exceeds, and a model with dropout."""
    options = {"Llama": dict(num_attention_heads=4), "Mistral": dict(sliding_window=40)}
    model = make(name, **options.get(name, {}))
    apart = gradient_apart(model)
    assert attend_inside_samples(model)
    rows = sorted(map(len, (row["input_ids"] for row in ROWS)))
    assert relative_error(gradient_packed(model), apart) <= EXACT
    computed = [length for number, length in calls for _ in range(number)]
    assert sorted(computed) == sorted(rows * 2)  # two layers


def test_neighbours_of_one_length_are_one_batch(calls):
    model = make("Llama")
    assert attend_inside_samples(model)
    lengths = [7, 7, 7, 5, 3, 3]
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in lengths]
    packed = model(**PackingCollator()(rows)).logits[0].split(lengths)
    assert calls == [(3, 7), (1, 5), (2, 3)] * 2
    for found, row in zip(packed, rows, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        assert (found - alone).abs().max() <= EXACT * alone.abs().max()


def test_a_sample_beyond_the_window_is_masked_as_transformers_does(calls):
    """The windows of Mistral and chunks of Llama 4 are 6 tokens, Gemma 3 alternates."""
    for name in ("Mistral", "Gemma3Text", "Llama4Text"):
        model = make(name)
        row = PackingCollator()(ROWS)
        expected = model(**row).logits
        assert attend_inside_samples(model)
        calls.clear()
        assert (model(**row).logits - expected).abs().max() <= EXACT * expected.abs().max()
        # A full layer attends inside samples beside one that is masked.
        assert bool(calls) == (name != "Mistral")


def test_a_padded_batch_takes_transformers_own_path(calls):
    model = make("Llama")
    batch = PaddingCollator(pad_token_id=0)(ROWS)
    expected = model(**batch).logits
    assert attend_inside_samples(model)
    assert torch.equal(model(**batch).logits, expected) and not calls
    alone = {"input_ids": torch.tensor([ROWS[0]["input_ids"]])}
    assert model(**alone).logits.isfinite().all() and not calls


def test_attention_that_is_not_plain_is_refused(calls):
    query = torch.randn(1, 2, 5, 4)
    lengths = torch.tensor([3, 2])
    for options in (
        {"softcap": 2.0},
        {"s_aux": torch.ones(2)},
        {"position_bias": torch.ones(1, 2, 5, 5)},
        {"is_causal": False},
    ):
        with pytest.raises(ValueError, match="packed_sdpa computes plain causal attention, and"):
            packed_attention.attention(torch.nn.Module(), query, query, query, lengths, **options)
    assert not calls


@pytest.mark.parametrize("heads", [2, 4])
def test_what_the_kernel_of_a_gpu_is_given(heads, monkeypatch):
    """The kernel runs on a GPU only (`benchmarks/gpu/packed.py`); here torch's attention on each
    sample takes its place and its arguments."""
    kernel_calls = []

    def kernel(query, key, value, ends, ends_k, longest, longest_k, *, scale, **options):
        assert torch.equal(ends, ends_k) and longest == longest_k and ends.dtype == torch.int32
        assert options.pop("window_size") == (-1, 0)
        assert options == ({"enable_gqa": True} if query.shape[1] != key.shape[1] else {})
        kernel_calls.append((ends.tolist(), longest, query.dtype))
        sizes = ends.diff().tolist()
        parts = (tensor.transpose(0, 1)[None].split(sizes, 2) for tensor in (query, key, value))
        found = [
            scaled_dot_product_attention(*one, scale=scale, is_causal=True, **options)
            for one in zip(*parts, strict=True)
        ]
        return torch.cat(found, dim=2)[0].transpose(0, 1)

    model = make("Llama", num_attention_heads=heads)
    assert attend_inside_samples(model)
    row = PackingCollator()(ROWS)
    lengths = [len(sample["input_ids"]) for sample in ROWS]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**row).logits
        monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
        monkeypatch.setattr(packed_attention, "has_varlen", lambda *_: True)
        found = model(**row).logits
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert kernel_calls == [(begins, max(lengths), torch.bfloat16)] * 2
    assert torch.equal(found, expected)
    # In float32 the samples are attended to one after the other.
    exact = model(**row).logits
    monkeypatch.setattr(packed_attention, "has_varlen", lambda *_: False)
    assert torch.equal(exact, model(**row).logits) and len(kernel_calls) == 2


def test_the_samples_are_found_by_one_read(monkeypatch):
    """A read waits for a GPU. transformers makes another one, to see that a row is packed."""
    model = make("Llama", num_hidden_layers=4)
    assert attend_inside_samples(model)
    monkeypatch.setattr(packed_attention, "has_varlen", lambda *_: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda query, *_, **__: query)
    row = PackingCollator()(ROWS)
    with torch.autocast("cpu", torch.bfloat16), Reads() as reads:
        model(**row)
    callers = (re.findall(r"\w+/(\w+\.py)", read) for read in reads.elements())
    innermost = sorted(next(f for f in files if f != "reads.py") for files in callers)
    assert innermost == ["masking_utils.py", "packed_attention.py"], reads


@pytest.mark.parametrize("of", [torch.bool, torch.float32])
def test_a_models_own_mask_of_two_dimensions_is_not_taken_for_samples(of, calls):
    """A model may hand attention a mask of (tokens, tokens), which broadcasts."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    seen = torch.ones(5, 5).tril() - torch.eye(5).roll(1, 0).tril(-1)
    mask = seen.bool() if of == torch.bool else torch.where(seen > 0, 0.0, -torch.inf)
    module = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention.attention(module, query, key, value, mask)
        expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(found, expected.transpose(1, 2)) and not calls
