"""Merging adapters: the mean of their products, against float64 by the definition, and what the
loaded models compute."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.errors import ConfigError
from accum_trainer.runs.average import concat_adapters
from accum_trainer.runs.merge import merge
from accum_trainer.runs.saved_model import SavedModel
from tests.made_runs import (
    COUNTS,
    lora_run,
    make_base,
    make_run,
    small_llama,
    write_sums,
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12)).logits


@pytest.fixture
def base(tmp_path):
    """A base model on disk, and the configuration of LoRA runs on it."""
    return functools.partial(make_base, tmp_path)


def deltas(folder) -> dict[str, torch.Tensor]:
    """s B A of each module of a saved adapter, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        for half_a, half_b in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            if name.endswith(half_a):
                b = tensors[name.replace(half_a, half_b)]
                found[name.removesuffix(half_a).removeprefix("base_model.model.")] = (
                    config["lora_alpha"] / root * (b.double() @ a.double())
                )
    return found


def mean_deltas(runs) -> dict[str, torch.Tensor]:
    """The weighted mean of the products, float64, by the definition."""
    samples = [json.loads((run / "result.json").read_text())["num_samples"] for run in runs]
    each = [deltas(run / "model") for run in runs]
    return {
        name: sum(n / sum(samples) * d[name] for n, d in zip(samples, each, strict=True))
        for name in each[0]
    }


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


class TestAdapters:
    """The mean of products."""

    def test_concat_acts_as_the_mean_of_products(self, tmp_path, base):
        config = base()
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n) for n in COUNTS]
        assert merge(runs, tmp_path / "out").method == "concat"
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (written["r"], written["lora_alpha"]) == (
            12,
            18,
        )  # three of rank 4; alpha / r stays 1.5
        found, exact = deltas(tmp_path / "out"), mean_deltas(runs)
        assert found.keys() == exact.keys() and len(found) == 4
        for name in exact:
            assert relative(found[name], exact[name]) < 1e-7
        # What it is not: the product of the means.
        naive = load_file(runs[0] / "model" / "adapter_model.safetensors")
        every = [load_file(run / "model" / "adapter_model.safetensors") for run in runs]
        naive = {
            name: sum(
                n / sum(COUNTS) * e[name].double() for n, e in zip(COUNTS, every, strict=True)
            )
            for name in naive
        }
        name = next(name for name in naive if "lora_A" in name)
        crossed = 1.5 * naive[name.replace("lora_A", "lora_B")] @ naive[name]
        assert (
            relative(
                crossed,
                exact[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")],
            )
            > 0.1
        )

    def test_forward_pass(self, tmp_path, base):
        """The loaded concat, the loaded product, and the base with the mean product added by hand:
        the same logits."""
        config = base()
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n) for n in COUNTS]
        merge(runs, tmp_path / "concat")
        assert merge(runs, tmp_path / "product", adapter="product").method == "product"
        by_hand = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
        plain = logits(by_hand)
        for name, delta in mean_deltas(runs).items():
            by_hand.get_submodule(name).weight.data += delta
        exact = logits(by_hand)
        concat = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(config.model), tmp_path / "concat"
        )
        product = AutoModelForCausalLM.from_pretrained(tmp_path / "product")
        assert relative(logits(concat), exact) < 1e-6
        assert relative(logits(product), exact) < 1e-6
        assert relative(plain, exact) > 0.01  # and the adapters do something
        for name, weight in product.state_dict().items():
            assert torch.equal(weight, by_hand.state_dict()[name].float())  # rounded once

    @pytest.mark.parametrize(
        "options", [{"lora_alpha": 20.0}, {"lora_alpha": 20.0, "use_rslora": True}]
    )
    def test_each_adapter_keeps_its_own_scale(self, tmp_path, base, options):
        config = base()
        runs = [
            lora_run(tmp_path / "a", config, 3, seed=1),
            lora_run(tmp_path / "b", config, 5, seed=2, **options),
        ]
        for order in (runs, runs[::-1]):
            out = tmp_path / f"out-{order[0].name}"
            merge(order, out)
            for name, exact in mean_deltas(runs).items():
                assert relative(deltas(out)[name], exact) < 1e-7

    def test_concat_is_the_product_of_pefts_cat(self, tmp_path, base):
        """Another implementation of the same mean; also with different ranks, which `merge`
        refuses."""
        config = base()
        options = [{}, {"lora_alpha": 20.0}, {"r": 2, "lora_alpha": 1.0}]
        runs = [
            lora_run(tmp_path / f"{n}", config, n, seed=n, **o)
            for n, o in zip(COUNTS, options, strict=True)
        ]
        adapters = [SavedModel(run / "model", run.name) for run in runs]
        concat_adapters(adapters, COUNTS, tmp_path / "ours")
        model = AutoModelForCausalLM.from_pretrained(config.model)
        names = ["first", "second", "third"]
        peft = PeftModel.from_pretrained(model, runs[0] / "model", adapter_name=names[0])
        for name, run in zip(names[1:], runs[1:], strict=True):
            peft.load_adapter(run / "model", adapter_name=name)
        weights = [n / sum(COUNTS) for n in COUNTS]
        peft.add_weighted_adapter(names, weights, "merged", combination_type="cat")
        peft.save_pretrained(tmp_path, selected_adapters=["merged"])
        ours, theirs = deltas(tmp_path / "ours"), deltas(tmp_path / "merged")
        assert ours.keys() == theirs.keys() and len(ours) == 4
        assert all(relative(theirs[name], ours[name]) < 2e-7 for name in ours)

    def test_embeddings_and_modules_to_save(self, tmp_path, base):
        config = base(lora_target_modules="q_proj,embed_tokens", lora_modules_to_save="lm_head")
        options = dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n, **options) for n in COUNTS]
        merge(runs, tmp_path / "concat")
        merge(runs, tmp_path / "product", adapter="product")
        exact, found = mean_deltas(runs), deltas(tmp_path / "concat")
        assert set(exact) == set(found) and "model.embed_tokens" in found
        assert all(relative(found[name], exact[name]) < 1e-7 for name in exact)
        heads = [
            load_file(r / "model" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
            for r in runs
        ]
        head = sum(n * h.double() for n, h in zip(COUNTS, heads, strict=True)) / sum(COUNTS)
        saved = load_file(tmp_path / "concat" / "adapter_model.safetensors")[
            "base_model.model.lm_head.weight"
        ]
        assert torch.equal(saved, head.float())
        start = load_file(tmp_path / "base" / "model.safetensors")
        product = load_file(tmp_path / "product" / "model.safetensors")
        assert torch.equal(product["lm_head.weight"], head.float())
        embedding = start["model.embed_tokens.weight"].double() + exact["model.embed_tokens"].T
        assert torch.equal(product["model.embed_tokens.weight"], embedding.float())
        assert torch.equal(product["model.norm.weight"], start["model.norm.weight"])

    def test_layers_stored_the_other_way_round(self, tmp_path, base):
        """GPT-2's Conv1D keeps its weight as (in, out)."""
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(corpus_tokenizer()), n_positions=64, n_embd=16, n_layer=1, n_head=2
            )
        )
        config = base(model, lora_target_modules="c_attn")
        options = dict(target_modules=["c_attn"], fan_in_fan_out=True)
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n, **options) for n in COUNTS]
        merge(runs, tmp_path / "concat")
        merge(runs, tmp_path / "product", adapter="product")
        concat = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(config.model), tmp_path / "concat"
        )
        product = AutoModelForCausalLM.from_pretrained(tmp_path / "product")
        assert relative(logits(product), logits(concat).double()) < 1e-6

    def test_product_has_the_dtype_of_the_base(self, tmp_path, base):
        config = base(dtype=torch.bfloat16)
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n) for n in COUNTS]
        merge(runs, tmp_path / "out", adapter="product")
        start, found = (
            load_file(tmp_path / name / "model.safetensors") for name in ("base", "out")
        )
        for name, delta in mean_deltas(runs).items():
            weight = found[f"{name}.weight"]
            assert weight.dtype == torch.bfloat16
            assert torch.equal(
                weight, (start[f"{name}.weight"].double() + delta).to(torch.bfloat16)
            )
        assert {t.dtype for t in found.values()} == {torch.bfloat16}

    def test_product_of_a_tied_weight_is_refused(self, tmp_path, base):
        config = base(small_llama(tie_word_embeddings=True), lora_modules_to_save="lm_head")
        runs = [
            lora_run(tmp_path / n, config, 4, seed=ord(n), modules_to_save=["lm_head"])
            for n in "ab"
        ]
        says = (
            r"lm_head.weight was adapted, but in the base model it is one tensor with "
            r"model.embed_tokens.weight \(tied\)"
        )
        with pytest.raises(ConfigError, match=says):
            merge(runs, tmp_path / "out", adapter="product")
        assert merge(runs, tmp_path / "out").method == "concat"

    def test_base_that_changed_since(self, tmp_path, base):
        config = base()
        runs = [lora_run(tmp_path / n, config, 4, seed=ord(n)) for n in "ab"]
        small_llama().save_pretrained(config.model)  # another seed
        with pytest.raises(
            ConfigError, match=r"started from weights \w{8}, but model=.* gives \w{8} here"
        ):
            merge(runs, tmp_path / "out", adapter="product")
        merged = merge(
            runs, tmp_path / "out", eval_file=write_sums(tmp_path / "held-out.jsonl", 7)
        )  # the adapters themselves have a mean
        assert (
            merged.loss is None
            and "nothing was evaluated: the runs started from" in merged.notes[-1]
        )

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("use_dora", True),
            ("bias", "all"),
            ("lora_bias", True),
            ("rank_pattern", {"q_proj": 2}),
            ("alpha_pattern", {"q_proj": 2}),
            ("init_lora_weights", "pissa"),
            ("layer_replication", [[0, 1]]),
            ("peft_type", "ADALORA"),
            ("something_of_a_later_peft", True),
        ],
    )
    def test_what_is_no_plain_lora_is_refused_by_name(self, tmp_path, key, value):
        for name in "ab":
            folder = make_run(tmp_path / name) / "model"
            folder.mkdir()
            config = LoraConfig(r=2, target_modules=["x"]).to_dict() | {
                "target_modules": ["x"],
                "runtime_config": None,
            }
            config.pop("runtime_config")
            (folder / "adapter_config.json").write_text(
                json.dumps(config | ({key: value} if name == "b" else {}))
            )
            halves = {
                "base_model.model.x.lora_A.weight": torch.ones(2, 3),
                "base_model.model.x.lora_B.weight": torch.ones(4, 2),
            }
            save_file(halves, folder / "adapter_model.safetensors")
        says = f"adapter of {tmp_path / 'b'} has {key}={value}".replace("[", r"\[").replace(
            "{", r"\{"
        )
        with pytest.raises(ConfigError, match=says):
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_concat_of_bf16_adapters_keeps_their_dtype(self, tmp_path, base):
        config = base()
        runs = [lora_run(tmp_path / n, config, 4, seed=ord(n), dtype=torch.bfloat16) for n in "ab"]
        concat_adapters(
            [SavedModel(run / "model", run.name) for run in runs], [1, 1], tmp_path / "out"
        )
        assert {
            t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
        } == {torch.bfloat16}
        for name, exact in mean_deltas(runs).items():
            assert (
                relative(deltas(tmp_path / "out")[name], exact) < 1e-7
            )  # halves are exact in bf16 too
