"""Memory that runs out where a window cannot be run again in parts: the last finished update is
saved, by the process that ran out, and the run continues from it to the same bits."""

from __future__ import annotations

import json
import re

import pytest

from tests.end_to_end.read_runs import weights_in
from tests.launching import python, torchrun
from tests.made_runs import write_sums

OPTIONS = ("--batch-size", "1", "--gradient-accumulation-steps", "2", "--steps", "5")
# Rank 1, or the only one, or all: in the backward of the 4th window's last micro-batch, or in the
# 4th update. More is asked for than a process can address.
IN_A_BACKWARD = """
import os, torch
from accum_trainer.train import loop
before, calls = loop.causal_lm_loss, []
def fail(gradient):
    torch.empty(2**46)
def failing(model, batch):
    calls.append(1)
    loss = before(model, batch)
    if len(calls) == 8 and os.environ.get("RANK", "1") in RANKS:
        loss.register_hook(fail)
    return loss
loop.causal_lm_loss = failing
"""
IN_AN_UPDATE = """
import torch
before, calls = torch.optim.AdamW.step, []
def step(self, closure=None):
    calls.append(1)
    before(self, closure)
    if len(calls) == 4:
        torch.empty(2**46)
torch.optim.AdamW.step = step
"""

IN_AN_EVALUATION = """
import torch
from accum_trainer.train.evaluation import Evaluation
Evaluation.mean_loss = lambda self, progress: torch.empty(2**46)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "rows.jsonl", 70)


@pytest.fixture
def run(tmp_path, rows):
    """Train in tmp_path/run, under a hook if `code` is given."""

    def start(processes, *more, code=None, folder="run"):
        hook = tmp_path / "hook.py"
        hook.write_text(code or "")
        argv = ("--cpu", "--dataset-file", rows, *OPTIONS, *more, "--output-dir", folder)
        more = {"cwd": tmp_path, "ACCUM_TESTS_HOOK": hook}
        if processes == 1:
            return python("-m", "accum_trainer.train", *argv, **more)
        return torchrun(processes, "accum_trainer.train", *argv, **more)

    return start


def error_of(done):
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    found = set(re.findall(r"^error(?: \(process 1\))?: (.*)$", done.stderr, re.MULTILINE))
    [line] = [said for said in found if "lost another process" not in said]
    return line


@pytest.mark.parametrize(
    "processes, ranks, more, why",
    [
        (1, "1", (), r"1 sample\(s\), \d+ positions, ran out of memory and cannot be cut in two"),
        (2, "1", (), "and cannot be run again in parts: it is the last of its window"),
        (2, "01", ("--recover-from-oom", "never"), "can't allocate memory: you tried to allocate"),
    ],
)
def test_the_last_finished_update_is_saved(tmp_path, run, processes, ranks, more, why):
    code = IN_A_BACKWARD.replace("RANKS", repr(ranks))
    said = error_of(run(processes, *more, code=code))
    assert re.search(f"{why}.*; the state after update 3 is saved. The same command", said), said
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert not (tmp_path / "run/model").exists()
    if more:  # the others continue
        return
    done = run(processes)
    assert done.returncode == 0 and "after 3 updates" in done.stderr, done.stderr
    assert run(processes, folder="whole").returncode == 0
    ours, theirs = (weights_in(tmp_path / name / "model") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2, 3, 4, 5]


def test_a_state_that_no_process_has_whole_is_not_saved(tmp_path, run):
    code = IN_A_BACKWARD.replace("RANKS", "'1'")
    said = error_of(run(2, "--engine", "fsdp2", code=code))
    assert "fsdp2 gathers weights" in said and "a part of fsdp2's state only" in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_update_whose_evaluation_does_not_fit_is_saved(tmp_path, run, rows):
    said = error_of(run(1, "--eval-every", "2", "--eval-file", rows, code=IN_AN_EVALUATION))
    assert "; the state after update 2 is saved" in said
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert run(1).returncode == 0
    records = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]


def test_half_an_update_is_not_saved(tmp_path, run):
    said = error_of(run(1, code=IN_AN_UPDATE))
    assert "it ran out in the update itself, which may have changed a part of the weights" in said
    assert not (tmp_path / "run/checkpoints").exists()
