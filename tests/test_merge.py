"""Merging against arithmetic by hand: numpy float64 on the files themselves, and what the loaded
models compute."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from accum_trainer.config import TrainConfig
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.lm.model import fingerprint, load_model
from accum_trainer.runs.average import concat_adapters
from accum_trainer.runs.merge import merge
from accum_trainer.runs.saved_model import SavedModel
from tests.made_runs import list_runs, make_run

COUNTS = (3, 5, 9)  # weights that no binary fraction holds
IDS = torch.arange(24).reshape(2, 12)


def small_llama(**options) -> LlamaForCausalLM:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(corpus_tokenizer()), num_key_value_heads=1, **sizes, **options)
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


class TestWholeModels:
    """The mean of weights."""

    def test_by_hand(self, tmp_path):
        """1 trained on 2 samples and 4 trained on 1: (2 x 1 + 1 x 4) / 3 = 2."""
        a = make_run(tmp_path / "a", {"w": torch.tensor([1.0])}, 2)
        b = make_run(tmp_path / "b", {"w": torch.tensor([4.0])}, 1)
        merged = merge([a, b], tmp_path / "out")
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [2.0]
        assert merged.method == "mean" and merged.loss is None
        assert "nothing was evaluated: the runs had no eval_file" in merged.notes[0]

    def test_is_the_correctly_rounded_mean_and_loads(self, tmp_path):
        """Against numpy in float64: equal after one rounding, so within half a unit of float32's
        last place (6e-8)."""
        for part in range(3):
            torch.manual_seed(part)
            small_llama().save_pretrained(
                make_run(tmp_path / str(part), num_samples=COUNTS[part]) / "model"
            )
        merge([tmp_path / str(part) for part in range(3)], tmp_path / "out")
        parts = [
            load_file(tmp_path / str(part) / "model" / "model.safetensors") for part in range(3)
        ]
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == parts[0].keys()
        for name, tensor in found.items():
            exact = np.average(
                [part[name].numpy().astype(np.float64) for part in parts], axis=0, weights=COUNTS
            )
            assert tensor.dtype == torch.float32
            assert np.abs(tensor.numpy() - exact).max() <= 1e-7 * np.abs(exact).max()
            np.testing.assert_array_max_ulp(tensor.numpy(), exact.astype(np.float32), maxulp=0)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtype_is_kept(self, tmp_path, dtype):
        weights = [torch.randn(7, 5, dtype=torch.float64).to(dtype) for _ in COUNTS]
        runs = [
            make_run(tmp_path / f"{n}", {"w": w}, n) for n, w in zip(COUNTS, weights, strict=True)
        ]
        merge(runs, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")["w"]
        exact = sum(n * w.double() for n, w in zip(COUNTS, weights, strict=True)) / sum(COUNTS)
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))

    def test_equal_weights_stay_as_they_are(self, tmp_path):
        weight = torch.randn(100)
        merge([make_run(tmp_path / f"{n}", {"w": weight}, n) for n in COUNTS], tmp_path / "out")
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], weight)

    def test_integer_buffers_are_left_alone(self, tmp_path):
        weights = [
            {
                "w": torch.ones(2),
                "steps": torch.tensor([10 * n]),
                "same": torch.arange(3),
                "mask": torch.tensor([True]),
            }
            for n in (1, 2)
        ]
        runs = [make_run(tmp_path / f"{n}", w) for n, w in enumerate(weights)]
        merged = merge(runs, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert (
            found["steps"].tolist() == [10]
            and found["same"].tolist() == [0, 1, 2]
            and found["mask"].tolist() == [True]
        )
        noted = [note for note in merged.notes if "differs between the runs" in note]
        assert noted == [
            f"steps (torch.int64) differs between the runs; the merge has that of {runs[0]}"
        ]

    def test_sharded_files(self, tmp_path):
        for part, size in (("whole", "1GB"), ("sharded", "100KB")):
            torch.manual_seed(len(part))
            small_llama().save_pretrained(make_run(tmp_path / part) / "model", max_shard_size=size)
        parts = [
            AutoModelForCausalLM.from_pretrained(tmp_path / p / "model").state_dict()
            for p in ("whole", "sharded")
        ]
        for names in (("whole", "sharded"), ("sharded", "whole")):
            out = tmp_path / f"{names[0]}-first"
            merge([tmp_path / name for name in names], out)
            assert (out / "model.safetensors.index.json").exists() == (names[0] == "sharded")
            for name, tensor in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
                assert torch.equal(
                    tensor, ((parts[0][name].double() + parts[1][name].double()) / 2).float()
                )

    def test_holds_one_tensor_of_each_model_at_a_time(self, tmp_path, monkeypatch):
        runs = [
            make_run(tmp_path / f"{n}", {f"w{i}": torch.ones(2) for i in range(5)})
            for n in range(3)
        ]
        order = []
        read = SavedModel.read
        monkeypatch.setattr(
            SavedModel, "read", lambda self, tensor: order.append(tensor) or read(self, tensor)
        )
        merge(runs, tmp_path / "out")
        assert order == [f"w{i}" for i in range(5) for _ in range(3)]

    def test_nan_of_a_diverged_run(self, tmp_path):
        a = make_run(tmp_path / "a", {"w": torch.ones(2)})
        b = make_run(tmp_path / "b", {"w": torch.tensor([1.0, math.nan])})
        with pytest.raises(
            ConfigError, match=f"w of {b} has numbers that are not finite; leave {b} out"
        ):
            merge([a, b], tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    def test_masks_of_minus_infinity_are_no_divergence(self, tmp_path):
        mask = torch.tensor([0.0, -math.inf])
        merge([make_run(tmp_path / name, {"mask": mask}) for name in "ab"], tmp_path / "out")
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mask"], mask)


@pytest.fixture
def base(tmp_path):
    """A base model on disk, and the configuration of LoRA runs on it."""

    def make(model=None, dtype=torch.float32, **options):
        torch.manual_seed(5)
        model = (model or small_llama()).to(dtype)
        model.save_pretrained(tmp_path / "base")
        corpus_tokenizer().save_pretrained(tmp_path / "base")
        return TrainConfig(
            model=str(tmp_path / "base"),
            use_peft=True,
            cpu=True,
            max_seq_len=64,
            dataset_file="nowhere.jsonl",
            **options,
        )

    return make


def initial_weights_of(config: TrainConfig) -> str:
    torch.manual_seed(config.seed)
    return fingerprint(load_model(config, corpus_tokenizer()))


def lora_run(
    folder, config: TrainConfig, num_samples: int, seed: int, dtype=torch.float32, **options
):
    """A run that ended with random adapters, and modules to save, of its own."""
    torch.manual_seed(config.seed)
    model = load_model(config.without_peft(), corpus_tokenizer())
    lora = (
        dict(r=4, lora_alpha=6.0, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        | options
    )
    adapted = get_peft_model(model, LoraConfig(**lora))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(dtype)
    make_run(
        folder, num_samples=num_samples, config=config, initial_weights=initial_weights_of(config)
    )
    adapted.save_pretrained(folder / "model")
    corpus_tokenizer().save_pretrained(folder / "model")
    return folder


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

    def test_base_that_changed_since(self, tmp_path, base, rows_to_evaluate):
        config = base()
        runs = [lora_run(tmp_path / n, config, 4, seed=ord(n)) for n in "ab"]
        small_llama().save_pretrained(config.model)  # another seed
        with pytest.raises(
            ConfigError, match=r"started from weights \w{8}, but model=.* gives \w{8} here"
        ):
            merge(runs, tmp_path / "out", adapter="product")
        merged = merge(
            runs, tmp_path / "out", eval_file=rows_to_evaluate
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


@pytest.fixture
def rows_to_evaluate(tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}"}) + "\n"
            for n in range(7)
        )
    )
    return path


def mean_loss(model, path) -> float:
    """Mean loss per target over a file, row by row in float64, from logits alone."""
    tokenizer, total, count = corpus_tokenizer(), 0.0, 0
    for line in path.read_text().splitlines():
        prompt, completion = (tokenizer(text).input_ids for text in json.loads(line).values())
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = (
                model.double()(ids)
                .logits.log_softmax(-1)[0, :-1]
                .gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            )
        total, count = total - float(log_p.sum()), count + len(log_p)
    return total / count


class TestEvaluation:
    """Losses of the inputs and of the merge, against the loaded models' own logits."""

    def test_whole_models(self, tmp_path, rows_to_evaluate):
        config = TrainConfig(
            dataset_file="nowhere.jsonl", eval_file=str(rows_to_evaluate), cpu=True, max_seq_len=64
        )
        for part, samples in enumerate(COUNTS):
            torch.manual_seed(part)
            folder = make_run(tmp_path / str(part), num_samples=samples, config=config)
            small_llama().save_pretrained(folder / "model")
            corpus_tokenizer().save_pretrained(folder / "model")
        merged = merge([tmp_path / str(part) for part in range(3)], tmp_path / "out")
        folders = [*(tmp_path / str(part) / "model" for part in range(3)), tmp_path / "out"]
        exact = [
            mean_loss(AutoModelForCausalLM.from_pretrained(folder), rows_to_evaluate)
            for folder in folders
        ]
        assert [*merged.input_losses, merged.loss] == pytest.approx(exact, rel=1e-6)
        assert len(set(exact)) == 4 and merged.notes == ()
        report = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert report["eval_loss"] == merged.loss and report["evaluated_on"] == str(
            rows_to_evaluate
        )
        assert [p["weight"] for p in report["parts"]] == [3 / 17, 5 / 17, 9 / 17]
        assert [p["eval_loss"] for p in report["parts"]] == list(merged.input_losses)
        assert (
            report["initial_weights"] == "0badcafe"
            and report["method"] == "mean"
            and report["num_samples"] == 17
        )

    @pytest.mark.parametrize("adapter", ["concat", "product"])
    def test_adapters(self, tmp_path, base, rows_to_evaluate, adapter):
        config = base()
        runs = [lora_run(tmp_path / f"{n}", config, n, seed=n) for n in COUNTS]
        merged = merge(runs, tmp_path / "out", adapter=adapter, eval_file=rows_to_evaluate)

        def adapted(folder):
            return PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(config.model), folder
            )

        whole = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            if adapter == "product"
            else adapted(tmp_path / "out")
        )
        exact = [
            mean_loss(model, rows_to_evaluate)
            for model in (*(adapted(run / "model") for run in runs), whole)
        ]
        assert [*merged.input_losses, merged.loss] == pytest.approx(exact, rel=1e-6)

    def test_eval_file_that_is_not_here_any_more(self, tmp_path):
        config = TrainConfig(dataset_file="nowhere.jsonl", eval_file="gone.jsonl")
        runs = [make_run(tmp_path / name, {"w": torch.ones(1)}, config=config) for name in "ab"]
        assert "eval_file=gone.jsonl is not here" in merge(runs, tmp_path / "out").notes[0]

    def test_leaves_the_callers_generator_alone(self, tmp_path, base):
        config = base()
        runs = [lora_run(tmp_path / n, config, 4, seed=ord(n)) for n in "ab"]
        before = torch.get_rng_state()
        merge(runs, tmp_path / "out", adapter="product")
        assert torch.equal(torch.get_rng_state(), before)


class TestRuns:
    """Which runs, and where to."""

    def test_a_parallel_independent_run_goes_to_merged(self, tmp_path):
        folder = list_runs(tmp_path / "two", "part-0", "part-1")
        for part in range(2):
            make_run(folder / f"part-{part}", {"w": torch.ones(1) * part}, shard=f"{part}/2")
        merged = merge([folder])
        assert merged.folder == folder / "merged" and merged.notes[:-1] == ()
        assert [run.name for run in merged.inputs] == ["part-0", "part-1"]
        assert sorted(path.name for path in folder.iterdir()) == [
            "independent.json",
            "merged",
            "part-0",
            "part-1",
        ]

    def test_force_replaces_an_earlier_merge(self, tmp_path):
        a, b, c = (make_run(tmp_path / n, {"w": torch.ones(1) * i}) for i, n in enumerate("abc"))
        merge([a, b], tmp_path / "out")
        with pytest.raises(
            ConfigError,
            match=r"holds a merge already; choose another folder, or replace it with --force",
        ):
            merge([b, c], tmp_path / "out")
        (tmp_path / "out" / "old-file").write_text("")
        merge([b, c], tmp_path / "out", force=True)
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1.5]
        assert not (tmp_path / "out" / "old-file").exists()

    def test_a_failure_leaves_an_earlier_merge(self, tmp_path, monkeypatch):
        a, b = (make_run(tmp_path / n, {"w": torch.ones(1)}) for n in "ab")
        merge([a, b], tmp_path / "out")
        monkeypatch.setattr("accum_trainer.runs.merge.average_models", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge([a, b], tmp_path / "out", force=True)
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]

    def test_unfinished_runs_as_they_stand(self, tmp_path):
        """One that was stopped says its samples; one that says nothing is counted by its records,
        skipped ones not."""
        a = make_run(tmp_path / "a", {"w": torch.tensor([0.0])}, 6)
        b = make_run(
            tmp_path / "b",
            {"w": torch.tensor([8.0])},
            4,
            done=False,
            stopped_by="SIGTERM",
            updates=2,
        )
        c = make_run(tmp_path / "c", {"w": torch.tensor([16.0])})
        (c / "result.json").unlink()
        records = [{"skipped": n == 1, "effective_batch_size": n + 2} for n in range(3)]
        (c / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records) + '{"skipped": fal'
        )
        merged = merge([a, b, c], tmp_path / "out", allow_unfinished=True)
        assert [run.num_samples for run in merged.inputs] == [6, 4, 2 + 4]
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [
            (4 * 8 + 6 * 16) / 16
        ]
        assert merged.notes[0] == f"{b} is unfinished: stopped by SIGTERM after 2 of 10 updates"
        assert (
            f"{c} is unfinished: is running, or was killed (result.json is missing) after 2 of 10"
            in merged.notes[1]
        )

    @pytest.mark.parametrize(
        ("shards", "common"),
        [(("0/2", "1/2"), 0), (("0/2", "0/2"), 1), (("3/4", "1/2"), 1), (("1/4", "0/2"), 0)],
    )
    def test_samples_in_common_are_noted(self, tmp_path, shards, common):
        runs = [
            make_run(tmp_path / f"{n}", {"w": torch.ones(1)}, shard=shard)
            for n, shard in enumerate(shards)
        ]
        notes = merge(runs, tmp_path / "out").notes
        noted = [note for note in notes if "samples in common" in note]
        assert len(noted) == common
        first, second = (set(range(64)[int(s[0]) :: int(s[2])]) for s in shards)
        assert bool(first & second) == bool(common)

    def test_files_that_are_damaged(self, tmp_path):
        a, b = (make_run(tmp_path / n, {"w": torch.ones(1)}) for n in "ab")
        weights = b / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:20])
        with pytest.raises(CheckpointError, match=f"weights of {b} in .* are damaged"):
            merge([a, b], tmp_path / "out")
        shutil.rmtree(b / "model")
        with pytest.raises(
            CheckpointError, match=f"{b} has no weights: .* holds no model.safetensors"
        ):
            merge([a, b], tmp_path / "out")
        (b / "result.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"result.json cannot be read"):
            merge([a, b], tmp_path / "out")
