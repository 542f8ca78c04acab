"""When a run saves and when it gives up: by time, after windows without an update, without its
launcher."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from accum_trainer import TrainConfig
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.train.loop import LAUNCHER_GONE
from accum_trainer.train.records import read_records
from accum_trainer.window_plan import global_order
from tests.end_to_end.started import Started, wait_for_end
from tests.launching import torchrun
from tests.made_runs import write_sums


@pytest.fixture
def rows(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "rows.jsonl", 70)


def test_diverged_training_ends_with_status_1(train, tmp_path, rows):
    finished = train(
        *("--dataset-file", rows, "--batch-size", "1", "--epochs", "2", "--lr", "1e30"),
        *("--max-grad-norm", "none", "--max-skips", "5", "--output-dir", "run"),
    )
    assert finished.status == 1
    said = r"5 of the last (\d+) windows gave no update \(--max-skips 5; last reason: non-finite\) "
    said += r"after update \d+: in the last of them the loss was finite, its gradient not; the "
    said += r"first parameter whose gradient has inf or nan is (model\.[\w.]+); it held samples "
    said += r"(\d+) of the training data"
    found = re.search(said, finished.error)
    assert found, finished.error
    # With B_eff 1 the samples are the seed's order (its arithmetic has tests of its own).
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    order = global_order(70, 0, len(records) // 70)
    assert [r["nonfinite_parameter"] for r in records if r["skipped"]][-1] == found[2]
    assert int(found[3]) == order[len(records) % 70 - 1]
    # Its weights are ruined: they replace no checkpoint and become no model.
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["done"], result["stopped_by"]) == (False, "divergence")
    assert result["skipped"] == 5


def test_the_process_and_the_samples_of_a_loss_that_is_not_finite_are_named(tmp_path, rows_file):
    """A model with one broken token, which is in the last of eight rows."""
    config = TrainConfig()
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer)
    [broken] = tokenizer(" =", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = math.nan
    # Its head is another matrix, or every logit would be nan.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    texts = [f"{n} and {n}" for n in range(7)] + ["7 = 7"]
    rows = rows_file("rows.jsonl", [{"text": text} for text in texts])
    argv = ["--cpu", "--model", tmp_path / "model", "--dataset-file", rows, "--max-skips", "1"]
    done = torchrun(
        2, "accum_trainer.train", *argv, "--batch-size", "1", "--output-dir", "run", cwd=tmp_path
    )
    said = (
        r"the loss was nan on process ([01]); .* is model\.\S+; it held samples (\d), (\d) of the "
    )
    said += "training data"
    found = re.search(said, done.stderr)
    assert done.returncode == 1 and found, done.stderr
    order = global_order(8, 0, 0).tolist()
    begin = order.index(7) // 2 * 2
    assert [int(n) for n in found.groups()[1:]] == sorted(order[begin : begin + 2])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["updates"], result["stopped_by"]) == (begin // 2, "divergence")


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_by_time(tmp_path, rows, processes):
    """Long before as many updates are made: on two processes, at the same ones."""
    argv = [
        *("--cpu", "--dataset-file", rows, "--batch-size", "1", "--steps", "12"),
        *("--checkpoint-minutes", "0.0001", "--keep-checkpoints", "100", "--output-dir", "run"),
    ]
    done = torchrun(processes, "accum_trainer.train", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(steps) >= 4 and steps[-1] == "step-00000012"


def under_torchrun(tmp_path, rows, run):
    """Two processes that train, two updates on; the pids of rank 0 and rank 1."""
    started = Started(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "accum_trainer.train", "--cpu", "--batch-size", "1", "--dataset-file", rows),
            *("--steps", "100000", "--output-dir", run),
        ],
        tmp_path,
        fresh=True,
    )
    started.until_update(run, 2)
    pid = started.process.pid
    ranks = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    by_rank = {b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes(): pid for pid in ranks}
    return started, [by_rank[False], by_rank[True]]


@pytest.mark.long
def test_processes_whose_launcher_was_killed_save_and_end(tmp_path, rows):
    """torchrun's launcher keeps the store that they met at; nothing tells them that it is gone."""
    run = tmp_path / "run"
    started, ranks = under_torchrun(tmp_path, rows, run)
    started.signal(signal.SIGKILL)
    assert started.ended() == -signal.SIGKILL
    for rank in ranks:
        wait_for_end(rank)
    result = json.loads((run / "result.json").read_text())
    assert (result["done"], result["stopped_by"]) == (False, LAUNCHER_GONE)
    assert "Traceback" not in started.err


def test_a_process_that_lost_another_says_so_in_one_sentence(tmp_path, rows):
    run = tmp_path / "run"
    started, [_, other] = under_torchrun(tmp_path, rows, run)
    os.kill(other, signal.SIGKILL)
    assert started.ended() == 1
    said = (
        r"error: process 0 lost another process (after update \d+|before the first update) \(.*\): "
        "it ended, and its log says "
    )
    # torchrun has a traceback of its own.
    assert re.search(said, started.err) and "loop.py" not in started.err, started.err
