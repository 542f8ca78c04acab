"""ZeRO-3 shards a model while it is read, so that no process ever holds it whole."""

from __future__ import annotations

import json

import pytest
import transformers

from tests.launching import torchrun


@pytest.mark.long
@pytest.mark.parametrize("flag", ["true", "false"])  # accelerate's `zero3_init_flag`
def test_each_process_holds_its_share_and_together_the_file(tmp_path, flag):
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    saved = transformers.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    launched = torchrun(
        2, "tests.loaded_in_shards", tmp_path, ACCELERATE_DEEPSPEED_ZERO3_INIT=flag, timeout=240
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    for rank in (0, 1):
        held, sums = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, p in saved.named_parameters():
            assert held[name] == (p.numel() + 1) // 2, name
            assert sums[name] == pytest.approx(float(p.detach().double().sum()), abs=1e-9), name
