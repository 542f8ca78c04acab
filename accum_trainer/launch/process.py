"""One process and not a later one with its PID, and signals that reach only it; also the
environment in which a process that is started imports from the same places.

A PID is used again after its process has ended. Knows nothing of trainings.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil


def start_of(pid: int) -> int | None:
    """When the process began, in a unit of this machine; None if there is no such process."""
    if sys.platform != "linux":
        try:
            return round(psutil.Process(pid).create_time() * 100)
        except psutil.Error:
            return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # proc_pid_stat(5): field 22, in clock ticks since boot. Field 2, the name, may hold blanks.
    return int(stat.rpartition(")")[2].split()[19])


def send_signal(pid: int, start: int, number: int) -> bool:
    """Send a signal (0: none) to the process `pid` that began at `start`; False if it has ended or
    belongs to another user."""
    if not hasattr(os, "pidfd_open"):
        if start_of(pid) != start:
            return False
        try:
            os.kill(pid, number)
        except OSError:
            return False
        return True
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Looked at after it was opened: from here on the descriptor means this process only.
        if start_of(pid) != start:
            return False
        signal.pidfd_send_signal(process, number)
    except OSError:
        return False
    finally:
        os.close(process)
    return True


def import_places() -> dict[str, str]:
    """Environment in which `python -m` does not import from the current folder, which may be
    someone else's, unless this process does (Python 3.11 and later)."""
    return {} if {"", os.getcwd()} & set(sys.path) else {"PYTHONSAFEPATH": "1"}
