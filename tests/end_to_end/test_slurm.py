"""The generated batch scripts, run by bash with stand-ins for srun and scontrol: requeued on the
signal, and resumed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from accum_trainer.train.records import read_records
from tests.end_to_end.started import Started
from tests.end_to_end.test_launch import equal, weights
from tests.launching import ROOT, torchrun

STAND_INS = ROOT / "tests" / "cluster"


@pytest.fixture
def rows(rows_file):
    return rows_file(
        "rows.jsonl", [{"text": f"{n} and {n + 1} " * (n % 5 + 1)} for n in range(200)]
    )


def submit(folder: Path, script: str, *arguments: object, **job: object) -> Started:
    """What `sbatch SCRIPT ARGUMENTS` starts on the first node, in `folder`."""
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": 4711, "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "node[1-2]"} | job
    return Started(
        ["bash", script, *arguments], folder, cwd=folder, PATH=path, STAND_IN=folder, **job
    )


def create(command, folder, *arguments):
    finished = command("config", "create", *arguments, "--cpu", "--slurm", cwd=folder)
    assert finished.status == 0, finished.err


def test_two_nodes_are_requeued_on_the_signal_and_resume(tmp_path, command, rows):
    batch = ["--batch-size", "2", "--gradient-accumulation-steps", "4"]
    create(
        command,
        tmp_path,
        "multi-gpu",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        *batch,
        "-o",
        "job.yaml",
    )
    train = ["--dataset-file", rows, "--lr", "1e-2", "--steps", 12]
    job = submit(tmp_path, "job.sbatch", *train, SLURM_NNODES=2)
    run = tmp_path / "runs" / "job-4711"
    job.until_update(run, 3)
    os.kill(
        int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1
    )  # as slurmstepd does before the time limit
    assert job.ended() == 75, job.err
    assert (tmp_path / "requeued").read_text() == "4711\n"
    stopped_at = len(read_records(run / "metrics.jsonl"))
    assert 3 <= stopped_at < 12
    again = submit(tmp_path, "job.sbatch", *train, SLURM_NNODES=2, SLURM_RESTART_COUNT=1)
    assert again.ended() == 0, again.err
    assert f"after {stopped_at} updates" in again.err
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 13))
    whole = torchrun(
        2,
        "accum_trainer.train",
        "--cpu",
        *batch,
        *train,
        "--output-dir",
        tmp_path / "whole",
        OMP_NUM_THREADS=1,
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert equal(weights(run), weights(tmp_path / "whole"))


def test_a_failure_is_not_requeued(tmp_path, command):
    create(command, tmp_path, "multi-gpu", "--gpus-per-node", "2", "-o", "job.yaml")
    job = submit(tmp_path, "job.sbatch", "--dataset-file", "nowhere.jsonl", SLURM_NNODES=1)
    assert job.ended() == 2
    assert (
        "error: data file nowhere.jsonl does not exist" in job.err
        and not (tmp_path / "requeued").exists()
    )


def test_an_array_of_independent_runs_trains_every_sample_once(tmp_path, command, rows):
    create(command, tmp_path, "parallel-independent", "--gpus-per-node", "2", "-o", "job.yaml")
    jobs = []
    for task in (0, 1):
        folder = tmp_path / f"output-{task}"
        folder.mkdir()
        (folder / "runs").symlink_to(tmp_path / "runs")
        (tmp_path / "runs").mkdir(exist_ok=True)
        ids = {"SLURM_ARRAY_JOB_ID": 17, "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": 18 + task}
        script = tmp_path / "job.sbatch"
        jobs.append(
            submit(folder, script, "--dataset-file", rows, "--batch-size", 8, "--epochs", 1, **ids)
        )
    assert [job.ended() for job in jobs] == [0, 0], jobs[0].err + jobs[1].err
    parts = [
        read_records(tmp_path / "runs" / "job-17" / f"part-{task}" / "metrics.jsonl")
        for task in (0, 1)
    ]
    assert [sum(record["effective_batch_size"] for record in records) for records in parts] == [
        100,
        100,
    ]
