"""`accum-trainer doctor`: each check is shown a real thing that is broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

from accum_trainer.doctor.machine import devices
from accum_trainer.doctor.places import file_system
from tests.launching import forked, run


@pytest.fixture
def doctor(command, tmp_path):
    """Run it in an empty folder: (exit status, name -> finding)."""

    def examined(*argv, **env):
        env = {"TORCH_EXTENSIONS_DIR": tmp_path / "extensions", "CXX": ""} | env
        finished = command("doctor", "--json", *argv, cwd=tmp_path, **env)
        assert "Traceback" not in finished.err
        report = json.loads(finished.out)
        assert report["can_train"] == (finished.status == 0)
        return finished.status, {found["name"]: found for found in report["findings"]}

    return examined


def test_a_machine_that_can_train(tmp_path):
    """A fresh process, in less than ten seconds of CPU, which leaves nothing behind."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = run([sys.executable, "-m", "accum_trainer", "doctor"], cwd=tmp_path, COLUMNS=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert not list(tmp_path.iterdir())
    lines = ended.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for said in (
        f"torch {torch.__version__}",
        "an update",
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used",
        "gloo works",
        "sdpa with flash, math",
    ):
        assert said in ended.stdout, ended.stdout
    assert lines[-1].startswith("training can run here")


def test_without_a_compiler(doctor, tmp_path):
    (tmp_path / "empty").mkdir()
    without = {"PATH": tmp_path / "empty"}
    status, found = doctor(**without)
    assert status == 0 and found["compiler"]["state"] == "limit"
    assert found["compiler"]["lacks"] == ["compile", "deepspeed"]
    assert "apt-get install g++" in found["compiler"]["remedy"]
    for need in ("compile", "deepspeed"):
        status, found = doctor("--need", need, **without)
        assert status == 1 and found["compiler"]["state"] == "fail"
    # One that is there and does not work.
    broken = tmp_path / "empty" / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: vector: No such file' >&2; exit 1\n")
    broken.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "empty"), "/bin", "/usr/bin"])
    status, found = doctor(PATH=path)
    assert "does not compile: fatal error: vector: No such file" in found["compiler"]["says"]
    assert doctor(PATH="/usr/bin:/bin")[1]["compiler"]["state"] == "ok"


def test_a_folder_that_cannot_hold_runs(doctor, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "runs", "/proc/runs"):
        status, found = doctor("--output-dir", folder)
        assert status == 1 and found["run directory"]["state"] == "fail", folder
        assert "give another --output-dir" in found["run directory"]["remedy"]


def test_a_full_disk(doctor, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(full)])
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        assert file_system(full / "deep" / "down") == ("tmpfs", str(full))
        status, found = doctor("--output-dir", full / "runs")
        assert status == 1
        assert "cannot be written: No space left on device" in found["run directory"]["says"]
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_a_port_that_is_taken(doctor):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, found = doctor("--port", port)
        assert status == 1
        assert f"{port} cannot be used: Address already in use" in found["port"]["says"]
        assert f"process {os.getpid()}" in found["port"]["says"]
        free = found["port"]["data"]["free"]
        assert f"--main_process_port {free}" in found["port"]["remedy"]
        status, found = doctor(MASTER_PORT=port)  # a launcher would find another
        assert status == 0 and found["port"]["state"] == "limit"
    assert doctor("--port", port)[0] == 0


def test_a_lock_of_a_build_that_was_killed(doctor, tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert doctor()[1]["DeepSpeed's extension"]["state"] == "ok"  # it may be building
    old = time.time() - 3600
    os.utime(lock, (old, old))
    with open(lock):  # now a process holds it
        assert doctor()[1]["DeepSpeed's extension"]["state"] == "ok"
    status, found = doctor("--need", "deepspeed")
    assert status == 1 and found["DeepSpeed's extension"]["remedy"] == f"rm {lock}"
    subprocess.run(found["DeepSpeed's extension"]["remedy"].split(), check=True)
    assert doctor("--need", "deepspeed")[0] == 0


@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor cannot be taken away")
def test_a_task_that_srun_bound_to_one_processor(doctor):
    mine = os.sched_getaffinity(0)
    status, found = doctor(SLURM_JOB_ID=1, SLURM_CPUS_PER_TASK=len(mine) + 1)
    assert status == 0 and found["processors"]["state"] == "limit"
    remedy = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
    assert remedy in found["processors"]["remedy"]
    code = (
        "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from accum_trainer.cli import main\nmain(['doctor'])"
    )
    ended = forked(1, "-c", code, SLURM_JOB_ID=1)
    assert "under srun this task is bound to one" in " ".join(ended.stdout.split()), ended.stdout


def test_a_job_of_several_nodes_on_a_local_disk(doctor, tmp_path):
    if file_system(tmp_path)[0] not in ("ext4", "xfs", "overlay", "tmpfs", "btrfs"):
        pytest.skip("this folder may be shared")
    status, found = doctor(SLURM_NNODES=2)
    assert status == 0 and "the job has 2 nodes" in found["run directory"]["says"]
    assert doctor("--need", "several nodes", SLURM_NNODES=2)[0] == 1


def test_a_version_outside_its_range(tmp_path):
    """And one that is too old; the command that mends it is one that pip takes."""
    for name, version in {"transformers": "4.0", "deepspeed": "0.1"}.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from accum_trainer.cli import main\nmain(['doctor', '--json'])"
    )
    ended = forked(1, "-c", code)
    found = {one["name"]: one for one in json.loads(ended.stdout)["findings"]}
    assert ended.returncode == 1
    assert "transformers 4.0 (<6,>=5.4)" in found["packages"]["says"]
    assert found["packages"]["remedy"] == "pip install 'transformers<6,>=5.4'"
    assert found["deepspeed"]["state"] == "limit" and "0.1, outside" in found["deepspeed"]["says"]


def test_what_is_needed_and_not_there(doctor, command, tmp_path):
    needed = ("--need", "gpu", "--need", "flash_attention_2")
    status, found = doctor(*needed, CUDA_VISIBLE_DEVICES="")
    assert status == 1 and found["device"]["state"] == found["attention"]["state"] == "fail"
    wrong = command("doctor", "--need", "luck", cwd=tmp_path)
    assert wrong.status == 2 and "several processes" in wrong.err


@pytest.mark.parametrize(
    ("cuda", "visible", "remedy"),
    [
        ("13.0", "", "unset CUDA_VISIBLE_DEVICES, or name a GPU that is there; else install"),
        ("13.0", None, "install torch's build for this driver's CUDA"),
        (None, "0", "install torch's build for this driver's CUDA"),
    ],
    ids=["hidden", "other build", "CPU build"],
)
def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path, cuda, visible, remedy):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    [found] = devices()
    assert found.state == "limit" and found.lacks == ("gpu",)
    assert "a GPU with driver 580.1 is there" in found.says
    assert found.remedy.startswith(remedy)


def test_text_names_what_fails(command, tmp_path):
    (tmp_path / "file").write_text("")
    finished = command("doctor", "--output-dir", "file/runs", cwd=tmp_path)
    assert finished.status == 1
    assert finished.out.splitlines()[-1] == "training would not run: run directory"
    assert shutil.which("c++") is None or "compiles" in finished.out
