"""--activation-offload: the inputs of checkpointed blocks leave the device; no update changes."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from accum_trainer import ConfigError, TrainConfig
from accum_trainer.cli import main
from accum_trainer.lm.offloading import offload_block_inputs
from accum_trainer.plan.shapes import trace

LAYERS, B, T, H = 3, 2, 24, 32


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": H, "intermediate_size": 64, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=2, **sizes))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=H, n_layer=LAYERS, n_head=2, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


class Host:
    """Stands in for the other memory: copies, of which the originals are watched."""

    def __init__(self) -> None:
        self.copies: list[torch.Tensor] = []
        self.originals: list[weakref.ref] = []
        self.brought_back = 0

    def away(self, tensor: torch.Tensor) -> int:
        self.copies.append(tensor.clone())
        self.originals.append(weakref.ref(tensor.untyped_storage()))
        return len(self.copies) - 1

    def back(self, number: int) -> torch.Tensor:
        self.brought_back += 1
        return self.copies[number]

    def inputs(self) -> list[torch.Tensor]:
        return [copy for copy in self.copies if copy.shape == (B, T, H)]


def gradients(model: torch.nn.Module, after_forward=lambda: None) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    after_forward()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_only_the_blocks_inputs_leave_and_the_gradient_is_the_same(build, reentrant):
    exact = gradients(build().double().train())  # without checkpointing
    host, model = Host(), build().double().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    offload_block_inputs(model, host.away, host.back)

    def look() -> None:
        assert len(host.inputs()) == LAYERS
        # Nothing else keeps them on the device: a block's output is the next one's input.
        assert [ref() for ref in host.originals[:LAYERS]] == [None] * LAYERS

    found = gradients(model, look)
    assert host.brought_back == len(host.copies) == LAYERS
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, exact[name], rtol=1e-12, atol=1e-14), name


def change(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


@pytest.mark.parametrize("offloads", [False, True])
def test_an_input_that_is_changed_in_place_is_an_error_as_without(offloads):
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offloads:  # on a CPU, where nothing moves
        offload_block_inputs(model)
    # What a block has saved, changed when it has run.
    model.model.layers[1].register_forward_hook(lambda _, inputs, __: change(inputs[0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model)


def test_a_model_without_checkpointed_blocks_is_refused():
    with pytest.raises(ConfigError, match="Linear has none; leave it out"):
        offload_block_inputs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "only with gradient_checkpointing"),
        ({"gradient_checkpointing": True, "compile": True}, "leave one of them out"),
    ],
)
def test_options_that_contradict_it(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(activation_offload=True, **options)


def test_the_plan_leaves_out_what_waits_on_the_host():
    """The built-in model's blocks keep b x t x 128 numbers each; the first is brought back last."""
    b, t = 2, 256
    kept, left = (
        trace(
            TrainConfig(max_seq_len=t, gradient_checkpointing=True, activation_offload=offload),
            b,
            "float32",
        ).peak()
        for offload in (False, True)
    )
    assert kept - left == pytest.approx(4 * 4 * b * t * 128, rel=0.3)


def test_a_run_trains_to_the_same_bits_and_says_what_a_cpu_gains(tmp_path, capsys):
    line = "train --cpu --batch-size 2 --global-batch-size 4 --steps 2 --max-seq-len 32"
    losses = []
    for name, options in (("plain", []), ("offloaded", ["--activation-offload"])):
        out = tmp_path / name
        arguments = [*line.split(), "--gradient-checkpointing", *options, "--output-dir", str(out)]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None)
        records = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert "activation_offload changes nothing on a CPU" in capsys.readouterr().err
