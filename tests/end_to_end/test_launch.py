"""`launch`: logs apart, failures in their own words, stopping and continuing."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from accum_trainer.train.records import read_records
from tests.end_to_end.started import Started, accum_trainer, process_of, wait_for_end
from tests.launching import ROOT, cli, torchrun

TWO = ROOT / "launch_configs" / "cpu_2proc.yaml"


@pytest.fixture
def train(tmp_path, rows_file):
    rows = rows_file(
        "rows.jsonl", [{"text": f"{n} and {n + 1} " * (n % 5 + 1)} for n in range(200)]
    )
    return [
        "--cpu",
        "--dataset-file",
        rows,
        "--batch-size",
        2,
        "--gradient-accumulation-steps",
        4,
        "--lr",
        "1e-2",
    ]


def launch(tmp_path, *arguments, **env):
    return Started(accum_trainer("launch", TWO, "--", *arguments), tmp_path, **env)


def pid_of(run, rank):
    return json.loads((run / "logs" / f"node-0-rank-{rank}.json").read_text())["pid"]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_saves_on_all_processes_and_the_same_command_continues(tmp_path, train):
    steps = [*train, "--steps", 12]
    whole = torchrun(2, "accum_trainer.train", *steps, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    arguments = [*steps, "--output-dir", tmp_path / "run"]
    started = launch(tmp_path, *arguments)
    started.until_update(tmp_path / "run", 3)
    started.signal(signal.SIGINT)
    assert started.ended() == 75, started.err
    assert "stopped by SIGTERM" in started.err and "Traceback" not in started.err
    stopped_at = len(read_records(tmp_path / "run" / "metrics.jsonl"))
    assert 3 <= stopped_at < 12
    again = cli("launch", TWO, "--", *arguments, OMP_NUM_THREADS=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"after {stopped_at} updates" in again.stderr
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_each_process_has_its_log_and_rank_0_the_screen(tmp_path, train):
    run = tmp_path / "run"
    finished = cli(
        "launch", TWO, "--", *train, "--steps", 2, "--output-dir", run, OMP_NUM_THREADS=1
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert sorted(path.name for path in (run / "logs").iterdir()) == [
        "launcher.log",
        "rank-0.log",
        "rank-1.log",
    ]
    log = (run / "logs" / "rank-0.log").read_text()
    assert "done: 2 updates" in log and log == finished.stderr
    assert "done" not in (run / "logs" / "rank-1.log").read_text()


def test_a_killed_process_is_named_and_its_run_continues(tmp_path, train):
    run = tmp_path / "run"
    arguments = [*train, "--steps", 8, "--checkpoint-every", 2, "--output-dir", run]
    started = launch(tmp_path, *arguments)
    started.until_update(run, 3)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    assert started.ended() == 1
    errors = [line for line in started.err.splitlines() if line.startswith("error")]
    assert (
        len(errors) == 1
        and "process 1 was killed by SIGKILL, as the kernel does when memory runs out" in errors[0]
    )
    assert "torch.distributed.elastic" not in started.err and "ChildFailedError" not in started.err
    again = torchrun(2, "accum_trainer.train", *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 9))


def test_the_process_that_failed_first_speaks_for_itself(tmp_path, train):
    """Process 1 raises in its third micro-batch; process 0 only loses its peer."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import accum_trainer.train.loop as "
        "train\n    loss, calls = train.causal_lm_loss, []\n    def failing(model, batch):\n       "
        " calls.append(1)\n        if len(calls) == 3:\n            raise FloatingPointError('the "
        "third micro-batch of process 1')\n        return loss(model, batch)\n    "
        "train.causal_lm_loss = failing\n"
    )
    finished = launch(
        tmp_path, *train, "--steps", 4, "--output-dir", tmp_path / "run", PYTHONPATH=hooks
    )
    assert finished.ended() == 1
    shown = finished.err.partition("process 1 of this training failed first, with status 1")[2]
    assert shown.count("Traceback") == 1 and shown.strip().endswith(
        "FloatingPointError: the third micro-batch of process 1"
    )
    assert "ChildFailedError" not in finished.err


@pytest.mark.parametrize("whole_group", [False, True], ids=["launcher", "launcher and torchrun"])
def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path, train, whole_group):
    """Nothing is left that would write into the run while the next start does; the run was
    saved."""
    run = tmp_path / "run"
    started = launch(tmp_path, *train, "--steps", 500, "--output-dir", run)
    started.until_update(run, 2)
    pids = [pid_of(run, rank) for rank in (0, 1)]
    if whole_group:
        os.kill(process_of("accelerate.commands.launch", str(run / "logs")), signal.SIGKILL)
        assert started.ended() == 75, started.err
    else:
        started.signal(signal.SIGKILL)
        assert started.ended() == -signal.SIGKILL
    for pid in pids:
        wait_for_end(pid)
    saved = json.loads((run / "result.json").read_text())
    assert not saved["done"] and saved["updates"] >= 2
