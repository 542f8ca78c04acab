"""When a run saves and when it gives up: by time, after windows without an update, without its
launcher."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from accum_trainer.train.loop import LAUNCHER_GONE
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


def test_processes_whose_launcher_was_killed_save_and_end(tmp_path, rows):
    """torchrun's launcher keeps the store that they met at; nothing tells them that it is gone."""
    run = tmp_path / "run"
    torchrun_two = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = Started(
        [
            *torchrun_two,
            *("--nproc_per_node", "2", "-m", "accum_trainer.train", "--cpu", "--batch-size", "1"),
            *("--dataset-file", rows, "--steps", "100000", "--output-dir", run),
        ],
        tmp_path,
    )
    started.until_update(run, 2)
    pid = started.process.pid
    ranks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    started.signal(signal.SIGKILL)
    assert started.ended() == -signal.SIGKILL and len(ranks) == 2
    for rank in ranks:
        wait_for_end(int(rank))
    result = json.loads((run / "result.json").read_text())
    assert (result["done"], result["stopped_by"]) == (False, LAUNCHER_GONE)
    assert "Traceback" not in started.err
