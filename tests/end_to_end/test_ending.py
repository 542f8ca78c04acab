"""When a run saves and when it gives up: by time, and after too many windows without an update."""

from __future__ import annotations

import json

import pytest

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
    assert "5 windows in a row gave no update (--max-skips; last reason: non-finite)" in (
        finished.error
    )
    # Its weights are ruined: they replace no checkpoint and become no model.
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["done"], result["stopped_by"]) == (False, "divergence")
    assert result["skipped"] == 5


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
