"""Merging against arithmetic by hand: numpy float64 on the files themselves, and what the loaded
models compute."""

from __future__ import annotations

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from accum_trainer.config import TrainConfig
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.runs.merge import merge
from accum_trainer.runs.saved_model import SavedModel
from tests.made_runs import (
    COUNTS,
    list_runs,
    lora_run,
    make_base,
    make_run,
    small_llama,
    write_sums,
)


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
    return functools.partial(make_base, tmp_path)


@pytest.fixture
def rows_to_evaluate(tmp_path):
    return write_sums(tmp_path / "held-out.jsonl", 7)


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
