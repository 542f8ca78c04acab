"""Models as configured: the named attention is in force, or the run does not start."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from accum_trainer import Accumulator, ConfigError, TrainConfig, causal_lm_loss
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.lm.packed_attention import PACKED_SDPA
from accum_trainer.losses.packing import find_packing
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.train import updates
from accum_trainer.train.checkpoint import load_checkpoint
from accum_trainer.train.loop import Run
from accum_trainer.train.model import _check_attention
from tests.reference import make_model


def test_attention_asked_for_is_in_force(tmp_path, fresh_accelerate):
    losses = {}
    for attention, in_force in ((None, PACKED_SDPA), ("sdpa", "sdpa"), ("eager", "eager")):
        folder = tmp_path / str(attention)
        config = TrainConfig(
            attention=attention, cpu=True, steps=2, max_seq_len=64, output_dir=str(folder)
        )
        losses[attention] = [record["loss"] for record in updates(config)]
        assert json.loads((folder / "plan.json").read_text())["attention"] == in_force
    for found in losses.values():
        assert found == pytest.approx(losses["eager"], rel=1e-5)


@pytest.mark.parametrize("model", ["./missing", "/no/where", "~/models/x", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(model):
    with pytest.raises(
        ConfigError, match=rf"^model={model}: there is no such folder; give a folder"
    ):
        load_tokenizer(TrainConfig(model=model))


def test_what_may_be_a_folder_or_a_hub_id_is_said_to_be_looked_for_there(caplog):
    for _ in range(2):
        with pytest.raises(ConfigError, match="^model=nobody/nothing cannot be found|gives no"):
            load_tokenizer(TrainConfig(model="nobody/nothing"))
    said = "model=nobody/nothing is no folder here; it is looked for on the hub"
    assert caplog.messages.count(said) == 1


@pytest.mark.long
def test_samples_packed_for_flex_attention_do_not_see_each_other():
    """Its loss against each sample alone in float64; only a GPU computes the gradient."""
    config = TrainConfig(attention="flex_attention")
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    model = load_model(config, tokenizer)
    torch.manual_seed(0)
    exact = load_model(TrainConfig(), tokenizer).double()
    generator = torch.Generator().manual_seed(1)
    tokens = [
        torch.randint(1, 400, (length,), generator=generator).tolist()
        for length in (5, 40, 17, 150)
    ]
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    with torch.no_grad():
        alone = sum(causal_lm_loss(exact, PaddingCollator(0)([row])).item() for row in rows)
        packed = causal_lm_loss(model, PackingCollator()(rows)).item()
    torch.compiler.reset()  # torch 2.13 compiles it for a CPU at one length, not for any
    found = find_packing(model, torch.tensor(tokens[3]), most=200, backward=False)
    assert found.holds, found
    assert packed == pytest.approx(alone, rel=1e-6)


def test_attention_that_the_models_code_does_not_know_is_refused(tmp_path):
    tokenizer = corpus_tokenizer()
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    )
    bloom.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), attention="sdpa")
    with pytest.raises(
        ConfigError,
        match="attention=sdpa cannot be used with model=.*no choice of attention and runs eager",
    ):
        load_model(config, load_tokenizer(config))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            "flash_attention_2",
            "attention=flash_attention_2 needs a GPU and 16-bit numbers, and this is a cpu",
        ),
        ("kernels-community/flash-attn2", "attention=kernels-community/flash-attn2 needs a GPU"),
        ("flex_attention", "attention=flex_attention gives no gradient on a CPU"),
    ],
)
def test_attention_that_a_cpu_cannot_run_is_refused(attention, message, fresh_accelerate):
    config = TrainConfig()
    model = load_model(config, load_tokenizer(config))
    model.config._attn_implementation = attention  # noqa: SLF001 as if its package were installed
    with pytest.raises(ConfigError, match=message):
        _check_attention(model, Accumulator(micro_batch_size=1, cpu=True).engine)


# --- dtypes ---


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    """A small Llama whose checkpoint is in bf16, and its folder."""
    folder = tmp_path_factory.mktemp("bf16")
    tokenizer = corpus_tokenizer()
    torch.manual_seed(0)
    model = make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder, out, **options):
    settings = {
        "steps": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_seq_len": 32,
        "lr": 1e-2,
    }
    run = Run(TrainConfig(model=str(folder), cpu=True, output_dir=str(out), **settings, **options))
    for _ in run.updates():
        pass
    return run


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("precision", "frozen"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_lora_keeps_frozen_weights_as_they_are_stored_where_it_computes_in_that_dtype(
    bf16_checkpoint, tmp_path, precision, frozen
):
    run = trained(
        bf16_checkpoint,
        tmp_path,
        mixed_precision=precision,
        use_peft=True,
        lora_modules_to_save="lm_head",
    )
    dtypes = {p.requires_grad: set() for p in run.training.model.parameters()}
    for parameter in run.training.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {frozen}}
    assert any("--amp keeps them in 16 bits" in note for note in run.training.notes) == (
        precision == "no"
    )
    written = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {w.dtype for w in written.values()} == {torch.float32}
    assert all("lora_" in name or "lm_head" in name for name in written)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_model_is_written_in_the_dtype_of_its_checkpoint(bf16_checkpoint, tmp_path, asked):
    trained(bf16_checkpoint, tmp_path, save_dtype=asked)
    dtype = torch.bfloat16 if asked == "auto" else torch.float32
    written = load_file(tmp_path / "model" / "model.safetensors")
    (newest,) = (tmp_path / "checkpoints").glob("step-00000002")
    exact = load_checkpoint(newest).model
    assert {w.dtype for w in exact.values()} == {torch.float32}
    for name, weight in written.items():
        assert weight.dtype == dtype and torch.equal(weight, exact[name].to(dtype)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == dtype
