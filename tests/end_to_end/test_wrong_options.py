"""Wrong options of `train`, and options that contradict a launcher or a model: refused."""

from __future__ import annotations

import pytest
from transformers import Mamba2Config, Mamba2ForCausalLM

from accum_trainer.data.embedded import corpus_tokenizer
from tests.end_to_end.wrong import refused
from tests.end_to_end.wrong.options import OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_option(train, tmp_path, name):
    argv, says = OPTIONS[name]
    refused(train, tmp_path, "--output-dir", "run", *argv, says=says)


def test_i23_k_of_the_launcher_must_agree(train, tmp_path):
    refused(
        train,
        tmp_path,
        *("--output-dir", "run", "--gradient-accumulation-steps", "8"),
        says="gradient_accumulation_steps=8, but the environment says "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4,
    )


def test_precision_of_the_launcher_must_agree(train, tmp_path):
    refused(
        train,
        tmp_path,
        *("--output-dir", "run", "--mixed-precision", "bf16"),
        says="mixed_precision=bf16, but the launcher says ACCELERATE_MIXED_PRECISION=fp16",
        ACCELERATE_MIXED_PRECISION="fp16",
    )


def test_i40_packed_samples_of_a_model_that_mixes_them(train, tmp_path):
    tokenizer = corpus_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8)
    sizes |= dict(n_groups=1, chunk_size=8)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(
        tmp_path / "mamba"
    )
    tokenizer.save_pretrained(tmp_path / "mamba")
    says = (
        "layout=packed cannot be used with model=mamba, whose packed samples see each other: "
        "logits of a packed sample differ from those of it alone by ",
        "use layout=padded",
    )
    options = ("--model", "mamba", "--batch-size", "4", "--max-seq-len", "32", "--steps", "1")
    refused(train, tmp_path, "--output-dir", "run", *options, "--layout", "packed", says=says)
    # It is padded by default.
    assert train("--output-dir", "run", *options).status == 0
