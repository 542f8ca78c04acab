"""Models, data, checkpoints and files that came from others, given to the real commands: each is
read as data or refused with status 2 and one message; none runs code. docs/security.md lists them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from accum_trainer.config import TrainConfig
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.errors import ConfigError
from accum_trainer.lm.model import load_model, load_tokenizer, shape_of_model, stored_dtype
from accum_trainer.train.checkpoint import digest_of
from tests.grids import thinned
from tests.made_runs import make_run

ROWS = [{"prompt": f"What is {n}?\n", "completion": f"It is {n}."} for n in range(8)]
SHORT = ("--steps", "1", "--batch-size", "2", "--output-dir", "run")
CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
open(os.environ["MARKER"], "a").write("ran ")
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path_factory, monkeypatch):
    """A file that exists once code that must not run has run."""
    path = tmp_path_factory.mktemp("marker") / "ran"
    monkeypatch.setenv("MARKER", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(path.parent / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return path


def small(folder):
    """A model and its tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    tokenizer = corpus_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_code(folder):
    """A model whose class comes with it."""
    config = json.loads((small(folder) / "config.json").read_text())
    names = {
        "AutoConfig": "code_mine.MineConfig",
        "AutoModelForCausalLM": "code_mine.MineForCausalLM",
    }
    config |= {"model_type": "mine", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_mine.py").write_text(CODE)
    return folder


class TestModel:
    """A model from the hub or from a friend."""

    def test_its_code_runs_only_if_asked_for(self, train, command, tmp_path, rows_file, marker):
        model = with_code(tmp_path / "model")
        given = ("--model", model, "--dataset-file", rows_file("rows.jsonl", ROWS), *SHORT)
        refused = train(*given)
        assert refused.status == 2 and "allow it with --trust-remote-code" in refused.error
        assert not marker.exists() and not (tmp_path / "run").exists()
        planned = command("plan", "--model", model, *SHORT[:4], cwd=tmp_path)
        assert planned.status == 2 and "--trust-remote-code" in planned.error
        assert not marker.exists()

        allowed = train(*given, "--trust-remote-code")
        assert allowed.status == 0, allowed.err
        assert marker.exists()
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        plan = json.loads((tmp_path / "run" / "plan.json").read_text())
        assert recorded["trust_remote_code"] is plan["trust_remote_code"] is True
        assert plan["model"] == str(model) and plan["revision"] is plan["model_commit"] is None

    def test_weights_are_no_program(self, train, tmp_path, rows_file, marker):
        model = small(tmp_path / "model")
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload(marker)}))
        refused = train("--model", model, "--dataset-file", rows_file("rows.jsonl", ROWS), *SHORT)
        assert refused.status == 2 and f"model={model} cannot be loaded" in refused.error
        assert not marker.exists()

    def test_a_chat_template_is_kept_in_jinjas_sandbox(self, train, tmp_path, rows_file, marker):
        model = small(tmp_path / "model")
        escape = "{{ cycler.__init__.__globals__.os.system('touch ' ~ '" + str(marker) + "') }}"
        (model / "chat_template.jinja").write_text(escape)
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        rows = rows_file("rows.jsonl", [{"messages": talk}])
        refused = train("--model", model, "--dataset-file", rows, *SHORT)
        assert refused.status == 2 and "the chat template refuses the conversation" in refused.error
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--revision", "main"], "revision=main has no effect on model=tiny"),
            (["--trust-remote-code"], "trust_remote_code=True has no effect on model=tiny"),
            (["--model", "{model}", "--revision", "v1"], "revision=v1 is for models from the hub"),
        ],
    )
    def test_options_without_effect(self, train, tmp_path, argv, says):
        model = small(tmp_path / "model")
        refused = train(*(part.format(model=model) for part in argv), *SHORT)
        assert refused.status == 2 and says in refused.error

    def test_a_revision_is_asked_for_in_every_load(self, monkeypatch):
        asked = []

        def load(self, name, **options):
            asked.append((name, options["revision"]))
            raise OSError("no network")

        for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
            monkeypatch.setattr(f"transformers.{kind}.from_pretrained", classmethod(load))
        config = TrainConfig(model="org/model", revision="c0ffee")
        for function in (load_tokenizer, shape_of_model, lambda c: load_model(c, None)):
            with pytest.raises(ConfigError, match="no network"):
                function(config)
        stored_dtype(config)  # `load_model` reports what went wrong
        assert asked == [("org/model", "c0ffee")] * 4


class TestFilesOfOptions:
    """A configuration, a launch file, a run's config.yaml."""

    def test_none_allows_a_models_code(self, train, command, tmp_path, rows_file, marker):
        model = with_code(tmp_path / "model")
        rows = rows_file("rows.jsonl", ROWS)
        options = {"model": str(model), "dataset_file": str(rows), "trust_remote_code": True}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
        launch = options | {"parallel_independent": True, "cuda_ids": "0,1", "cpu": True}
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
        for refused in (
            train("--config", "run.yaml", *SHORT),
            command("launch", "launch.yaml", "--", *SHORT, cwd=tmp_path),
        ):
            assert refused.status == 2, refused.err
            assert "a file cannot allow this" in refused.error
            assert "--trust-remote-code" in refused.error
        with pytest.raises(ConfigError, match="a file cannot allow this"):
            TrainConfig.from_yaml(tmp_path / "run.yaml")
        allowing = TrainConfig.from_yaml(tmp_path / "run.yaml", trust_remote_code=True)
        assert allowing.trust_remote_code
        assert not marker.exists() and not (tmp_path / "run").exists()
        allowed = command(
            *("launch", "launch.yaml", "--", *SHORT, "--trust-remote-code"), cwd=tmp_path
        )
        assert allowed.status == 0, allowed.err
        assert marker.exists()  # each run is a process, whose command line allows it too

    @pytest.mark.parametrize("words", [["train", "--config", "x.yaml"], ["launch", "x.yaml"]])
    def test_yaml_makes_no_objects(self, command, tmp_path, marker, words):
        text = f"parallel_independent: !!python/object/apply:os.system ['touch {marker}']\n"
        (tmp_path / "x.yaml").write_text(text)
        refused = command(*words, cwd=tmp_path)
        assert refused.status == 2 and "x.yaml" in refused.error and "YAML" in refused.error
        assert not marker.exists()

    def test_a_run_that_was_trained_so_does_not_count_in_a_merge(self, command, tmp_path, marker):
        runs = [tmp_path / name for name in ("a", "b")]
        config = TrainConfig(model=str(tmp_path / "gone"), trust_remote_code=True)
        for run in runs:
            make_run(run, config=config)
            with_code(run / "model")
        refused = command("merge", *runs, "-o", "out", cwd=tmp_path)
        assert refused.status == 2, refused.err
        assert "allow it with --trust-remote-code" in refused.error
        assert not marker.exists() and not (tmp_path / "out").exists()
        merged = command("merge", *runs, "-o", "out", "--trust-remote-code", cwd=tmp_path)
        assert merged.status == 0, merged.err
        assert marker.exists()


class TestCheckpoint:
    """A run directory or checkpoint to continue from."""

    @pytest.mark.parametrize("file", ["part-00000-of-00001.safetensors", "state.json"])
    def test_a_pickle_in_it_runs_nothing_and_is_one_message(self, train, tmp_path, marker, file):
        """In a checkpoint whose manifest says that all is well."""
        assert train(*SHORT).status == 0
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
        torch.save({"state": Payload(marker)}, checkpoint / file)
        content = (checkpoint / file).read_bytes()
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"][file] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest["sha256"] = digest_of(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        new = ("--steps", "2", "--batch-size", "2", "--output-dir", "new")
        refused = train(*new, "--resume", "run")
        assert refused.status == 2
        assert "run/checkpoints/step-00000001 was not written by accum_trainer" in refused.error
        assert not marker.exists() and not (tmp_path / "new").exists()


class TestCache:
    """Files that are computed once; another user of the machine may want to read or write them."""

    def test_others_can_neither_read_nor_write_it(self, train, tmp_path, rows_file):
        previous = os.umask(0)
        try:
            rows = rows_file("rows.jsonl", ROWS)
            done = train("--dataset-file", rows, *SHORT, ACCUM_TRAINER_CACHE=tmp_path / "cache")
        finally:
            os.umask(previous)
        assert done.status == 0, done.err
        for name in ("", "rows", "tokenized"):
            assert stat.S_IMODE((tmp_path / "cache" / name).stat().st_mode) == 0o700, name

    def test_a_folder_that_a_group_shares_stays_shared(self, train, tmp_path, rows_file):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o2770)
        rows = rows_file("rows.jsonl", ROWS)
        done = train("--dataset-file", rows, *SHORT, ACCUM_TRAINER_CACHE=tmp_path / "cache")
        assert done.status == 0, done.err
        for name in ("", "rows", "tokenized"):
            assert stat.S_IMODE((tmp_path / "cache" / name).stat().st_mode) == 0o2770, name

    @pytest.mark.parametrize("kind", thinned(["tokenized", "rows"], ["tokenized"]))
    def test_what_is_no_table_in_it_is_not_loaded(self, train, tmp_path, rows_file, marker, kind):
        rows = rows_file("rows.jsonl", ROWS)
        cache = tmp_path / "cache"
        given = ("--dataset-file", rows, *SHORT[:4])
        assert train(*given, "--output-dir", "a", ACCUM_TRAINER_CACHE=cache).status == 0
        tables = list((cache / kind).rglob("*.arrow"))
        assert tables
        for table in tables:
            table.write_bytes(pickle.dumps(Payload(marker)))
        again = train(*given, "--output-dir", "b", ACCUM_TRAINER_CACHE=cache)
        assert again.status == 0, again.err  # it is made again
        assert not marker.exists()
        losses = [
            json.loads((tmp_path / run / "metrics.jsonl").read_text())["loss"] for run in "ab"
        ]
        assert losses[0] == losses[1]


def test_bad_rows_are_skipped_and_counted_if_asked_for(train, tmp_path, rows_file):
    lines = [json.dumps(row) for row in ROWS]
    rows = rows_file("rows.jsonl", "\n".join([*lines[:3], '{"prompt": "a', *lines[3:], "{}", ""]))
    given = ("--dataset-file", rows, "--eval-file", rows, *SHORT)
    refused = train(*given)
    assert refused.status == 2 and "line 4 is not JSON" in refused.error
    assert not (tmp_path / "run").exists()
    done = train(*given, "--on-bad-row", "skip")
    assert done.status == 0, done.err
    words = f"rows of {rows} that were skipped (on_bad_row=skip): 2, the first because line 4 is"
    assert f"note: {words} not JSON" in done.err
    assert f"note: evaluation: {words} not JSON" in done.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["num_samples"] == 8
    assert plan["skipped_rows"] == plan["skipped_eval_rows"] == 2


def test_logs_of_independent_runs_are_private(train, tmp_path, rows_file):
    rows = rows_file("rows.jsonl", ROWS)
    given = ("--dataset-file", rows, *SHORT, "--parallel-independent", "--cuda-ids", "0,1")
    done = train(*given)
    assert done.status == 0, done.err
    logs = list((tmp_path / "run" / "logs").glob("*.log"))
    assert len(logs) == 2
    assert {stat.S_IMODE(log.stat().st_mode) for log in logs} == {0o600}


def test_secrets_of_the_environment_are_in_no_file(train, tmp_path, rows_file):
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    rows = rows_file("rows.jsonl", ROWS)
    tokens = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), secret)
    done = train("--dataset-file", rows, *SHORT, **tokens)
    assert done.status == 0, done.err
    assert secret not in done.out + done.err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
