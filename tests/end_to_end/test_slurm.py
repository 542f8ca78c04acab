"""The generated batch scripts, run by bash with stand-ins for srun and scontrol: requeued on the
signal, and resumed."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from accum_trainer import TrainConfig
from accum_trainer.launch.launch_file import read_launch_file
from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import weights_in
from tests.end_to_end.started import Started
from tests.end_to_end.test_launch import hooked, pid_of
from tests.launching import ROOT, torchrun
from tests.reference import equal

STAND_INS = ROOT / "tests" / "cluster"


@pytest.fixture
def rows(rows_file):
    return rows_file(
        "rows.jsonl", [{"text": f"{n} and {n + 1} " * (n % 5 + 1)} for n in range(200)]
    )


def submit(folder: Path, script: str, *arguments: object, **job: object) -> Started:
    """What `sbatch SCRIPT ARGUMENTS` starts on the first node, in `folder`."""
    path = os.pathsep.join([str(STAND_INS), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": 4711, "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "node[1-2]"} | job
    cpus = re.search(r"^#SBATCH --cpus-per-task=(\d+)", (folder / script).read_text(), re.MULTILINE)
    (folder / "tmp").mkdir(exist_ok=True)
    job = {"TMPDIR": folder / "tmp", "SLURM_CPUS_PER_TASK": cpus[1]} | job
    return Started(
        ["bash", script, *arguments], folder, cwd=folder, PATH=path, STAND_IN=folder, **job
    )


def stop(folder: Path) -> None:
    """What slurmstepd does before the time limit."""
    os.kill(int((folder / "srun.pid").read_text()), signal.SIGUSR1)


def requeued(folder: Path) -> int:
    """How often the job went back into the queue."""
    file = folder / "requeued"
    return len(file.read_text().splitlines()) if file.exists() else 0


def create(command, folder, *arguments):
    finished = command("config", "create", *arguments, "--cpu", "--slurm", cwd=folder)
    assert finished.status == 0, finished.err


@pytest.mark.long
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
    # Node 0 takes longer to end: it must not be killed because node 1 has ended with a stop.
    slow = hooked(
        tmp_path,
        "import atexit, os, sys, time\nif os.environ.get('SLURM_NODEID') == '0' and "
        "'--output-dir' in sys.argv and 'RANK' not in os.environ and sys.argv[1] == 'launch':\n"
        "    atexit.register(time.sleep, 5)\n",
    )
    job = submit(tmp_path, "job.sbatch", *train, SLURM_NNODES=2, ACCUM_TESTS_HOOK=slow)
    run = tmp_path / "runs" / "job-4711"
    job.until_update(run, 3)
    stop(tmp_path)
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
    assert equal(weights_in(run / "model"), weights_in(tmp_path / "whole" / "model"))


def test_a_failure_is_not_requeued(tmp_path, command):
    signal_at = ["--signal", "USR1@77"]
    create(command, tmp_path, "multi-gpu", "--gpus-per-node", "2", *signal_at, "-o", "job.yaml")
    assert "export ACCUM_TRAINER_NOTICE_SECONDS=77\n" in (tmp_path / "job.sbatch").read_text()
    job = submit(tmp_path, "job.sbatch", "--dataset-file", "nowhere.jsonl", SLURM_NNODES=1)
    assert job.ended() == 2
    assert (
        "error: data file nowhere.jsonl does not exist" in job.err
        and not (tmp_path / "requeued").exists()
    )


@pytest.mark.long
def test_the_run_directory_decides_not_the_status_of_srun(tmp_path, command, rows):
    """A node that was slow to end was killed; and each process may use all CPUs of the job."""
    create(command, tmp_path, "multi-gpu", "--gpus-per-node", "2", "-o", "job.yaml")
    train = ["--dataset-file", rows, "--batch-size", 2, "--steps", 500]
    run = tmp_path / "runs" / "job-4711"
    job = submit(tmp_path, "job.sbatch", *train, SLURM_NNODES=1)
    job.until_update(run, 2)
    assert len(os.sched_getaffinity(pid_of(run, 1))) == min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "status").write_text("137")
    stop(tmp_path)
    assert job.ended() == 75, job.err
    assert requeued(tmp_path) == 1
    ended = json.loads((run / "result.json").read_text())
    done = json.dumps(ended | {"done": True, "stopped_by": ""})
    (run / "result.json").write_text(done)
    again = submit(tmp_path, "job.sbatch", *train, "--dry-run", SLURM_NNODES=1)
    assert again.ended() == 0, again.err
    assert requeued(tmp_path) == 1


def test_a_job_that_is_stopped_before_training_begins_is_not_requeued_for_ever(
    tmp_path, command, rows
):
    create(command, tmp_path, "multi-gpu", "--gpus-per-node", "2", "-o", "job.yaml")
    run, slow = tmp_path / "runs" / "job-4711", tmp_path / "slow.py"
    slow.write_text("import sys, time\nif sys.argv[0] == 'accum_trainer.train':\n    time.sleep(5)")
    for start in (0, 1):
        train = ["--dataset-file", rows, "--steps", 500]
        more = {"SLURM_NNODES": 1, "SLURM_RESTART_COUNT": start, "ACCUM_TESTS_HOOK": slow}
        job = submit(tmp_path, "job.sbatch", *train, **more)
        job.until(lambda: list(run.glob("logs/.processes-*")))
        stop(tmp_path)
        if start == 0:
            assert job.ended() == 75, job.err
            assert "stopped by SIGUSR1, and nothing was saved" in job.err
            assert requeued(tmp_path) == 1
            noted = json.loads((run / "logs" / "requeues.json").read_text())
            assert noted == {"updates": 0, "without_progress": 1}
            # Two more starts like this one.
            (run / "logs" / "requeues.json").write_text(json.dumps(noted | {"without_progress": 3}))
        else:
            assert job.ended() == 1, job.err
            assert "stopped 4 times in a row without a new update" in job.err
            assert requeued(tmp_path) == 1


def test_what_one_node_refuses_is_not_requeued(tmp_path, command, rows):
    """Node 1 has a wrong variable, and node 0 is killed for it."""
    two = ["--nodes", "2", "--gpus-per-node", "1"]
    create(command, tmp_path, "multi-gpu", *two, "-o", "job.yaml")
    hooks = hooked(
        tmp_path,
        "import os\nif os.environ.get('SLURM_NODEID') == '1':\n"
        "    os.environ['ACCUM_TRAINER_MAX_GRAD_NORM'] = 'much'\n",
    )
    train = ["--dataset-file", rows, "--steps", 3]
    job = submit(tmp_path, "job.sbatch", *train, SLURM_NNODES=2, ACCUM_TESTS_HOOK=hooks)
    assert job.ended() == 2, job.err
    assert "max_grad_norm='much' is not a number" in job.err
    assert requeued(tmp_path) == 0


@pytest.mark.parametrize("theirs", ["link", "owner"])
def test_a_cache_folder_that_is_not_the_users_own_is_refused(tmp_path, command, rows, theirs):
    if theirs == "owner" and os.getuid() != 0:
        pytest.skip("only root can make a folder of another user")
    create(command, tmp_path, "multi-gpu", "--gpus-per-node", "2", "-o", "job.yaml")
    cache = tmp_path / "tmp" / f"accum_trainer-{pwd.getpwuid(os.getuid()).pw_name}"
    cache.parent.mkdir()
    if theirs == "link":
        (tmp_path / "elsewhere").mkdir()
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    job = submit(tmp_path, "job.sbatch", "--dataset-file", rows, SLURM_NNODES=1)
    assert job.ended() == 2
    assert f"error: {cache} is no folder of your own" in job.err
    assert not (tmp_path / "runs").exists() and requeued(tmp_path) == 0


def test_any_name_is_kept_whole(tmp_path, command, rows):
    """Of the launch file, and of values that differ between the runs of an array."""
    names = ['it\'s "one" #1 $(touch injected).jsonl', "two\nlines `touch injected`.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(rows.read_bytes())
    config = 'a "job" #2 $(touch injected).yaml'
    vary = f"dataset_file={names[0]},{names[1]}"
    create(command, tmp_path, "parallel-independent", "--vary", vary, "-o", config)
    text = yaml.safe_load((tmp_path / config).read_text())
    assert text["vary"] == vary
    script = config.replace(".yaml", ".sbatch")
    assert subprocess.run(["bash", "-n", tmp_path / script]).returncode == 0
    for task, name in enumerate(names):
        ids = {"SLURM_ARRAY_JOB_ID": 17, "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_NAME": "a #1"}
        job = submit(tmp_path, script, "--batch-size", 2, "--steps", 1, **ids)
        assert job.ended() == 0, job.err
        trained = TrainConfig.from_yaml(tmp_path / "runs" / "a #1-17" / f"part-{task}/config.yaml")
        assert trained.dataset_file == name
    assert not (tmp_path / "injected").exists()
    [option] = re.findall(r"^#SBATCH --job-name=(\S+) ", (tmp_path / script).read_text(), re.M)
    assert option == "a__job___2___touch_injected_"


def test_a_launch_file_of_any_name_starts(tmp_path, command, rows):
    config = "a 'job' #2.yaml"
    two = ["--gpus-per-node", "2", "-o", config]
    create(command, tmp_path, "multi-gpu", *two, "--engine", "zero2")
    read = read_launch_file(tmp_path / config, cpu=True)
    assert read.deepspeed_file == tmp_path / "a 'job' #2.json"
    create(command, tmp_path, "multi-gpu", *two, "--force")
    script = config.replace(".yaml", ".sbatch")
    train = ["--dataset-file", rows, "--dry-run"]
    job = submit(tmp_path, script, *train, SLURM_NNODES=1)
    assert job.ended() == 0, job.err
    assert "dry run: nothing was trained" in job.err
    mode = stat.S_IMODE(next((tmp_path / "tmp").glob("accum_trainer-*")).stat().st_mode)
    assert mode == 0o700


@pytest.mark.long
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
    options = yaml.safe_load((tmp_path / "runs" / "job-17" / "part-0" / "config.yaml").read_text())
    assert options["notice_seconds"] == 180  # of --signal
    parts = [
        read_records(tmp_path / "runs" / "job-17" / f"part-{task}" / "metrics.jsonl")
        for task in (0, 1)
    ]
    assert [sum(record["effective_batch_size"] for record in records) for records in parts] == [
        100,
        100,
    ]
