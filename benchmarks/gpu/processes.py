"""A process that is ended with all that it started when its time is over. Knows nothing of
parts."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.gpu.part import ROOT


def run(
    command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]
) -> int | None:
    """Run a command in the repository's root, its output in `log`: exit status, or None if it was
    ended after `limit` s."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and all that it started."""
    try:
        parent = psutil.Process(process.pid)
        left = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for one in left:
        _send(one, "terminate")
    for one in psutil.wait_procs(left, timeout=10)[1]:
        _send(one, "kill")
    process.wait()


def _send(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return


def how_it_ended(status: int | None, limit: float) -> str:
    """In words; "" for a success."""
    if status is None:
        return f"it was ended after {limit:.0f} s"
    if status < 0:
        return f"it ended with signal {-status}"
    return f"it ended with exit status {status}" if status else ""
