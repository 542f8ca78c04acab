"""A stopped run writes its checkpoint and no model; a model of an earlier end is not taken for the
newest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from accum_trainer.train.model_origin import read_origin
from tests.end_to_end.read_runs import result_of, weights_in
from tests.launching import torchrun
from tests.reference import equal

STEPS = ("--batch-size", "2", "--max-seq-len", "32", "--lr", "1e-2", "--output-dir", "run")
AT_ONCE = ("--max-hours", "1e-9")  # after one window the next ends the run

# Process RANK sends itself SIGTERM after update 2.
STOPPED = """
import os, signal, sys
from accum_trainer import TrainConfig
from accum_trainer.train import updates
config = TrainConfig(cpu=True, batch_size=2, steps=9, max_seq_len=32, lr=1e-2, output_dir="run")
for record in updates(config):
    if record["step"] == 2 and os.environ.get("RANK", "0") == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_leaves_a_checkpoint_and_no_model(tmp_path, command, processes):
    run = tmp_path / "run"
    rank = str(processes - 1)
    ended = torchrun(processes, "-c", STOPPED, rank, cwd=tmp_path, timeout=150)
    assert ended.returncode == 0, ended.stderr
    assert (run / "checkpoints" / "step-00000003").is_dir()
    assert not (run / "model").exists()
    result = result_of(run)
    assert (result["done"], result["updates"], result["model_updates"]) == (False, 3, None)
    assert (
        "after 3 updates, saved; the same command with --output-dir run continues, and "
        "`accum-trainer checkpoint export run -o DIR` writes the model so far\n" in ended.stderr
    )
    exported = command("checkpoint", "export", "run", "-o", "so-far", cwd=tmp_path)
    assert exported.status == 0, exported.err
    assert read_origin(tmp_path / "so-far").updates == 3


def test_a_continued_run_that_is_stopped_says_of_which_update_its_model_is(
    train, command, tmp_path
):
    run = tmp_path / "run"
    assert train(*STEPS, "--steps", "3").status == 0
    assert result_of(run)["model_updates"] == 3
    before = weights_in(run / "model")
    stopped = train(*STEPS, "--steps", "9", *AT_ONCE)
    assert stopped.status == 75
    assert stopped.out.endswith(
        "stopped by time limit after 5 updates, saved; the same command with --output-dir run "
        "continues, and `accum-trainer checkpoint export run -o DIR` writes the model so far "
        "(run/model is still that of update 3)\n"
    )
    result = result_of(run)
    assert (result["updates"], result["model_updates"]) == (5, 3)
    assert equal(weights_in(run / "model"), before)
    assert command("checkpoint", "export", "run", "-o", "so-far", cwd=tmp_path).status == 0
    assert not equal(weights_in(tmp_path / "so-far"), before)
    assert train(*STEPS, "--steps", "5").status == 0  # as the run stands, it is done
    assert equal(weights_in(run / "model"), weights_in(tmp_path / "so-far"))
    assert result_of(run)["model_updates"] == 5


def test_a_stop_in_the_last_window_is_a_run_that_is_done(train, tmp_path):
    stopped = train(*STEPS, "--steps", "2", *AT_ONCE)
    assert stopped.status == 75 and "export" not in stopped.out
    assert result_of(tmp_path / "run")["done"] and (tmp_path / "run" / "model").is_dir()


def test_a_merge_takes_an_unfinished_run_only_with_the_model_of_its_newest_checkpoint(
    train, command, tmp_path
):
    def merge(*more):
        asked = ("merge", "run", "other", "-o", "out", "--allow-unfinished", *more)
        return command(*asked, cwd=tmp_path)

    shard = ("--shard", "0/2")
    assert train(*STEPS, *shard, "--steps", "2").status == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert train(*STEPS, *shard, "--steps", "9", *AT_ONCE).status == 75
    refused = merge()
    assert refused.status == 2 and not (tmp_path / "out").exists()
    assert (
        "run stopped by time limit after 4 of 9 updates, but run/model is that of update 2, which "
        "is not its newest checkpoint; move it away, and `accum-trainer checkpoint export run -o "
        "run/model` writes the newest" in refused.error
    )
    shutil.rmtree(tmp_path / "run" / "model")
    assert "has no model yet; `accum-trainer checkpoint export run -o run/model`" in merge().error
    exported = command("checkpoint", "export", "run", "-o", "run/model", cwd=tmp_path)
    assert exported.status == 0, exported.err
    # A killed run has no result: the model's own samples count, not those of later records.
    (tmp_path / "run" / "result.json").unlink()
    records = tmp_path / "run" / "metrics.jsonl"
    records.write_text(2 * records.read_text())
    merged = merge()
    assert merged.status == 0, merged.err
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [part["num_samples"] for part in report["parts"]] == [8, 4]
    mine, other, mean = (weights_in(tmp_path / n) for n in ("run/model", "other/model", "out"))
    name = "model.norm.weight"
    assert torch.allclose(mean[name], (2 * mine[name] + other[name]) / 3, atol=1e-7)
    assert read_origin(tmp_path / "out") is None
    # A user may have gone back to an earlier checkpoint, and made the same number of updates.
    note = json.loads((tmp_path / "run" / "model" / "accum_trainer.json").read_text())
    note["checkpoint"] = "0" * 64
    (tmp_path / "run" / "model" / "accum_trainer.json").write_text(json.dumps(note))
    assert "which is not its newest checkpoint" in merge("--force").error
