"""Models as they are asked for: the attention that is named is in force, or the run does not start."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from accum_trainer import Accumulator, ConfigError, TrainConfig, causal_lm_loss
from accum_trainer.assemble import _check_attention
from accum_trainer.cutting import _layout
from accum_trainer.data.collating import PackingCollator, PaddingCollator
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.model import load_model, load_tokenizer
from accum_trainer.train import updates


def test_attention_asked_for_is_in_force(tmp_path, fresh_accelerate):
    losses = {}
    for attention in (None, "eager"):
        folder = tmp_path / str(attention)
        config = TrainConfig(attention=attention, cpu=True, steps=2, max_seq_len=64, output_dir=str(folder))
        losses[attention] = [record["loss"] for record in updates(config)]
        assert json.loads((folder / "plan.json").read_text())["attention"] == (attention or "sdpa")
    assert losses[None] == pytest.approx(losses["eager"], rel=1e-5)


def test_samples_packed_for_flex_attention_do_not_see_each_other():
    """Its loss, whose gradient only a GPU makes, against each sample alone in float64."""
    config = TrainConfig(attention="flex_attention")
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    model = load_model(config, tokenizer)
    torch.manual_seed(0)
    exact = load_model(TrainConfig(), tokenizer).double()
    assert _layout(config, model) == ("packed", "flex_attention computes no attention between samples")
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(1, 400, (length,), generator=generator).tolist() for length in (5, 40, 17, 150)]
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    with torch.no_grad():
        alone = sum(causal_lm_loss(exact, PaddingCollator(0)([row])).item() for row in rows)
        packed = causal_lm_loss(model, PackingCollator()(rows)).item()
    assert packed == pytest.approx(alone, rel=1e-6)


def test_attention_that_the_models_code_does_not_know_is_refused(tmp_path):
    tokenizer = corpus_tokenizer()
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2))
    bloom.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), attention="sdpa")
    with pytest.raises(
        ConfigError, match="attention=sdpa cannot be used with model=.*no choice of attention, and runs eager"
    ):
        load_model(config, load_tokenizer(config))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flash_attention_2", "attention=flash_attention_2 needs a GPU and 16-bit numbers, and this is a cpu"),
        ("kernels-community/flash-attn2", "attention=kernels-community/flash-attn2 needs a GPU"),
        ("flex_attention", "attention=flex_attention gives no gradient on a CPU"),
    ],
)
def test_attention_that_a_cpu_cannot_run_is_refused(attention, message, fresh_accelerate):
    config = TrainConfig()
    model = load_model(config, load_tokenizer(config))
    model.config._attn_implementation = attention  # as where its package is installed
    with pytest.raises(ConfigError, match=message):
        _check_attention(model, Accumulator(micro_batch_size=1, cpu=True).engine)
