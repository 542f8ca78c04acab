"""Memory of this process: in use, at its peak, free."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


def memory_gb(device: torch.device) -> float:
    """Memory in use now, in 10^9 bytes: allocated on the GPU, or resident for a process on the
    CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return _process_status("VmRSS")


def peak_gb(device: torch.device) -> float:
    """The most memory in use since `reset_peak`, in 10^9 bytes, counted as `memory_gb` does."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _process_status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Count the peak from here on, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(
            OSError
        ):  # a container may forbid it; the peak then counts from the process's start
            Path("/proc/self/clear_refs").write_text("5")


def _process_status(key: str) -> float:
    """A size of this process from the kernel, in 10^9 bytes; on systems without /proc, the peak for
    either key."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
        return kibibytes * 1024 / 1e9
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
