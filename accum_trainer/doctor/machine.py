"""The machine: devices, memory, processors, clock. Imports torch."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from accum_trainer.doctor.report import FAIL, LIMIT, OK, Finding
from accum_trainer.engine.memory import free_bytes, free_in_cgroup
from accum_trainer.errors import first_line

_SHARED_MEMORY = Path("/dev/shm")  # where loaders' workers and NCCL exchange data
_LEAST_SHARED = 256e6
_LEAST_MEMORY = 2e9
_LEAST_FILES = 1024


def devices() -> Iterator[Finding]:
    """Each GPU, tried with a product; or why there is none."""
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver is None:
            remedy = "a GPU needs its driver (nvidia-smi shows it), and the container --gpus all"
            yield Finding("device", "CPU; no GPU was found", OK, remedy, ("gpu",), data={"gpus": 0})
            return
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        remedy = (
            "install torch's build for this driver's CUDA (pip install torch), or a newer driver"
        )
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda and hidden is not None:
            built += f" with CUDA_VISIBLE_DEVICES={hidden!r}"
            remedy = "unset CUDA_VISIBLE_DEVICES, or name a GPU that is there; else " + remedy
        yield Finding(
            "device",
            f"a GPU with driver {driver} is there, and torch {torch.__version__}, {built}, cannot "
            "use it",
            LIMIT,
            remedy,
            ("gpu",),
            {"gpus": 0, "driver": driver},
        )
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index, driver)


def _gpu(index: int, driver: str | None) -> Finding:
    name = torch.cuda.get_device_name(index)
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        assert float((ones @ ones).sum()) == 64**3
        free, total = torch.cuda.mem_get_info(index)
    except (RuntimeError, AssertionError) as error:
        return Finding(
            f"GPU {index}",
            f"{name} does not compute: {first_line(error)}",
            FAIL,
            "leave it out with CUDA_VISIBLE_DEVICES, or restart its driver",
        )
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    is_taken = free < total / 2
    taken = "; other processes hold more than half of it" if is_taken else ""
    return Finding.limit_if(
        is_taken,
        f"GPU {index}",
        f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free{taken}; capability {capability}, "
        f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}",
        "nvidia-smi shows who uses it",
        ("free GPU memory",),
        {"name": name, "free_gb": free / 1e9, "total_gb": total / 1e9, "capability": capability},
    )


def _nvidia_driver() -> str | None:
    """The driver's version as nvidia-smi says it; None without a GPU or its driver."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def memory() -> Iterator[Finding]:
    """Host memory, in the container's limits; memory shared between processes; open files."""
    free, total = free_bytes(torch.device("cpu")), float(psutil.virtual_memory().total)
    limited = " (limited by the container)" if free_in_cgroup() < math.inf else ""
    yield Finding.limit_if(
        free < _LEAST_MEMORY,
        "memory",
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free{limited}",
        "end other programs, or ask the batch system for more",
        ("memory",),
        {"free_gb": free / 1e9, "total_gb": total / 1e9},
    )
    if _SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(_SHARED_MEMORY)
        yield Finding.limit_if(
            shared.free < _LEAST_SHARED,
            "shared memory",
            f"{shared.free / 1e9:.2f} GB free in {_SHARED_MEMORY}",
            "start the container with --shm-size=8g, or empty it",
            ("loader workers", "several GPUs"),
            {"free_gb": shared.free / 1e9},
        )
    yield from _open_files()


def _open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on every system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding.limit_if(
        0 <= soft < _LEAST_FILES,
        "open files",
        f"at most {'any number' if soft < 0 else soft}",
        f"ulimit -n {max(_LEAST_FILES, min(hard, 65536))}",
        ("loader workers",),
        {"soft": soft, "hard": hard},
    )


def processors() -> Iterator[Finding]:
    """The processors that this process may use, against what the batch system gave."""
    there = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    says = f"{mine} of {there} may be used"
    threads = os.environ.get("OMP_NUM_THREADS")
    says += (
        f"; OMP_NUM_THREADS={threads}" if threads else f"; torch takes {torch.get_num_threads()}"
    )
    data = {"usable": mine, "there": there, "machine": platform.machine()}
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdecimal() and mine < int(given):
        yield Finding(
            "processors",
            f"{says}, but SLURM_CPUS_PER_TASK={given}: srun does not take it over from sbatch",
            LIMIT,
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK (in the batch script, before srun)",
            ("all processors",),
            data,
        )
        return
    if "SLURM_JOB_ID" in os.environ and mine == 1 < there:
        yield Finding(
            "processors",
            f"{says}: under srun this task is bound to one",
            LIMIT,
            "give sbatch --cpus-per-task=N, and export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            ("all processors",),
            data,
        )
        return
    yield Finding("processors", says, data=data)


def clock() -> Iterator[Finding]:
    """The clock, against the newest file of torch: one that is behind makes certificates invalid
    and the time limit of batch jobs wrong."""
    newest = Path(torch.__file__).stat().st_mtime
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    if now < newest - 86400:
        yield Finding(
            "clock",
            f"{shown}: before torch was installed here",
            LIMIT,
            "timedatectl set-ntp true",
            ("downloads",),
        )
        return
    yield Finding("clock", shown, data={"seconds": now})
