"""`accum-trainer checkpoint export`: what a stopped run had learnt, for from_pretrained."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from accum_trainer.runs.export import export
from tests.end_to_end.read_runs import weights_in
from tests.end_to_end.started import Started, accum_trainer
from tests.reference import equal

SHORT = (
    *("--batch-size", "2", "--max-seq-len", "64", "--steps", "2", "--lr", "1e-2"),
    *("--checkpoint-every", "1", "--output-dir", "run"),
)


@pytest.mark.parametrize("options", [(), ("--use-peft",), ("--save-dtype", "bfloat16")])
def test_the_last_checkpoint_gives_the_saved_model(train, command, tmp_path, options):
    assert train(*SHORT, *options).status == 0
    done = command("checkpoint", "export", "run", "-o", "so-far", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out == "so-far: the model of run/checkpoints/step-00000002\n"
    assert equal(weights_in(tmp_path / "so-far"), weights_in(tmp_path / "run" / "model"))
    exported, saved = (tmp_path / name / "README.md" for name in ("so-far", "run/model"))
    card = exported.read_text()
    assert card == saved.read_text() and "| optimizer updates | 2, on 4 samples |" in card
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {path.name for path in (tmp_path / "so-far").iterdir()} == names


def test_an_earlier_one_is_the_model_of_then(train, command, tmp_path):
    assert train(*SHORT).status == 0
    first = "run/checkpoints/step-00000001"
    assert command("checkpoint", "export", first, "-o", "a/b", cwd=tmp_path).status == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "b").pad_token_id is not None
    name = "model.embed_tokens.weight"
    last = weights_in(tmp_path / "run" / "model")[name]
    assert not torch.equal(dict(model.named_parameters())[name], last)


def test_wrong_input(train, command, tmp_path):
    assert train(*SHORT).status == 0
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "alone" / "c" / "s"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for source, target, says in (
        ("run", "full", "output=full exists already"),
        ("nowhere", "new", "source=nowhere is no folder"),
        ("auto", "new", "source=auto is no folder"),
        ("run/model", "new", "is not a whole checkpoint: its manifest.json is missing"),
        ("alone/c/s", "new", "lies in no run directory"),
    ):
        refused = command("checkpoint", "export", source, "-o", target, cwd=tmp_path)
        assert refused.status == 2 and says in refused.error, refused.err
        assert not (tmp_path / "new").exists()


def test_a_run_that_trains_and_deletes_what_is_read_gives_its_newest(tmp_path):
    options = ("--cpu", "--batch-size", "2", "--max-seq-len", "16", "--steps", "100000")
    saves = ("--checkpoint-every", "25", "--keep-checkpoints", "1", "--output-dir", "run")
    started = Started(accum_trainer("train", *options, *saves), tmp_path, cwd=tmp_path)
    run = tmp_path / "run"
    try:
        started.until(lambda: (run / "last-checkpoint.json").exists())
        steps = [int(export(run, tmp_path / str(i)).name[5:]) for i in range(8)]
    finally:
        os.killpg(started.process.pid, signal.SIGKILL)
    assert steps == sorted(steps) and steps[0] < steps[-1]
