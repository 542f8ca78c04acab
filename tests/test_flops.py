"""Operations of training against torch's own counter; the table of peaks; `mfu` of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from accum_trainer.speed.flops import training_flops
from accum_trainer.speed.peaks import PEAKS, peak_flops, peak_of
from accum_trainer.train.records import read_records
from tests.launching import cli, torchrun
from tests.made_runs import write_sums

LLAMA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "tied head": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    ),
    "experts": lambda: Qwen3MoeConfig(
        **LLAMA, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "wide heads": lambda: LlamaConfig(**LLAMA, head_dim=16),
    "sliding": lambda: Gemma3TextConfig(
        **LLAMA, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    ),
}  # fmt: skip


def model_of(config):
    # Only these implementations are made of operations that the counter knows.
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )


def counted(model, length):
    ids = torch.arange(length)[None] % 60
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_as_many_as_torch_counts(name):
    model = model_of(CONFIGS[name]())
    for length in (16, 48):
        flops = training_flops(model, np.array([length]))
        assert flops.of(length, length) == counted(model, length)


def test_a_frozen_weight_needs_two_thirds():
    """torch counts a little less: the first layer's input needs no gradient."""
    model = model_of(LlamaConfig(**(LLAMA | {"num_hidden_layers": 12})))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    found = training_flops(adapted, np.array([32])).of(32, 32)
    assert 0.99 < counted(adapted, 32) / found < 1


def test_the_head_counts_at_the_targets():
    """Nobody needs the logits of the others, and `train` does not compute them."""
    model = model_of(CONFIGS["llama"]())
    ids = torch.arange(32)[None]
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(ids).last_hidden_state[0, 19:31]  # before tokens 20 to 31
        torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[0, 20:]).backward()
    assert training_flops(model, np.array([32])).of(32, 12) == counter.get_total_flops()


def test_attention_follows_the_lengths_and_the_window():
    model = model_of(CONFIGS["llama"]())
    # L=2, H=4, Q=8: 12 L H Q = 768 for each token that is attended to.
    one = training_flops(model, np.array([10])).per_token
    two = training_flops(model, np.array([10, 30])).per_token
    assert two - one == pytest.approx(768 * ((100 + 900) / 40 - 10))
    sliding = model_of(
        Gemma3TextConfig(
            **LLAMA, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip
    grows = [training_flops(sliding, np.array([n])).per_token for n in (8, 20)]
    assert grows[1] - grows[0] == pytest.approx(384 * 12)  # of the full layer only


def test_peaks_of_devices():
    names = {
        "NVIDIA H100 80GB HBM3": (989.5, 494.5, 67),
        "NVIDIA H100 PCIe": (756, 378, 51),
        "NVIDIA H200": (989.5, 494.5, 67),
        "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
        "Tesla V100-SXM2-32GB": (125, 15.7, 15.7),
        "Tesla T4": (65, 8.1, 8.1),
        "NVIDIA L40S": (362.05, 183, 91.6),
        "NVIDIA L4": (121, 60, 30.3),
        "NVIDIA GH200 480GB": (989.5, 494.5, 67),
        "NVIDIA GB200": (2500, 1250, 80),
        "AMD Instinct MI300X": (1307.4, 653.7, 163.4),
    }
    for name, rates in names.items():
        for arithmetic, rate in zip(("half", "tf32", "single"), rates, strict=True):
            assert peak_of(name, arithmetic) == pytest.approx(rate * 1e12), name
    for name in (
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX A4000",  # an A40 is another card
        "NVIDIA RTX A1000",
        "NVIDIA A10G",
    ):
        assert peak_of(name, "half") is None, name
    assert peak_flops(torch.device("cpu"), "no") is None
    assert all(peak.source and peak.single <= (peak.tf32 or peak.half) for peak in PEAKS)


def test_mfu_of_a_run(tmp_path):
    rows = write_sums(tmp_path / "rows.jsonl", 70)
    argv = ["train", "--cpu", "--batch-size", "4", "--max-seq-len", "64", "--dataset-file", rows]
    for name, more in {"known": ["--peak-tflops", "0.02"], "unknown": []}.items():
        ended = cli(*argv, "--steps", "3", "--output-dir", tmp_path / name, *more)
        assert ended.returncode == 0, ended.stderr
    records = read_records(tmp_path / "known" / "metrics.jsonl")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "known" / "model")
    for record in records:
        # All rows of this file have nearly the same length, so attention is nearly the mean's.
        mean = record["num_tokens"] / record["effective_batch_size"]
        lengths = np.array([round(mean)])
        needed = training_flops(model, lengths).of(record["num_tokens"], record["num_targets"])
        expected = needed / (record["step_time_sec"] * 0.02e12)
        assert record["mfu"] == pytest.approx(expected, rel=0.02)
    assert {r["mfu"] for r in read_records(tmp_path / "unknown" / "metrics.jsonl")} == {None}


def test_sharded_weights_count_whole(tmp_path):
    """Under FSDP2 and ZeRO-3 a process holds a part of each weight, or a placeholder for it."""
    rows = write_sums(tmp_path / "rows.jsonl", 70)
    argv = ["--batch-size", "2", "--global-batch-size", "8", "--max-seq-len", "64", "--steps", "2"]
    argv += ["--dataset-file", rows, "--peak-tflops", "0.02"]
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    needed = {}
    for name, processes, more, env in (
        ("single", 1, ["--cpu"], {}),
        ("fsdp2", 2, ["--cpu"], fsdp2),
        ("zero3", 2, ["--zero-stage", "3"], {}),
    ):
        run = [*argv, *more, "--output-dir", tmp_path / name]
        ended = torchrun(processes, "accum_trainer.train", *run, **env)
        assert ended.returncode == 0, ended.stderr[-3000:]
        needed[name] = [
            r["mfu"] * r["step_time_sec"] * processes
            for r in read_records(tmp_path / name / "metrics.jsonl")
        ]
    assert needed["fsdp2"] == pytest.approx(needed["single"], rel=1e-9)
    assert needed["zero3"] == pytest.approx(needed["single"], rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_placeholder_counts_as_the_weight_that_it_stands_for(name):
    """ZeRO-3 leaves an empty tensor, and the shape beside it."""
    model = model_of(CONFIGS[name]())
    whole = training_flops(model, np.array([16]))
    for weight in model.parameters():
        weight.ds_shape = weight.shape
        weight.data = torch.empty(0)
    assert training_flops(model, np.array([16])) == whole
