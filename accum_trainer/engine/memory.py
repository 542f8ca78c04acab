"""Memory of one process and its device: in use, at its peak, free, run out, given back.

It knows tensors and devices, no engine. Sizes are bytes, or 10^9 bytes if the name ends in `_gb`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache

# Messages of libraries that do not raise torch.OutOfMemoryError. The list of accelerate's
# find_executable_batch_size without its cuDNN error, which has other causes too, and with the
# messages of the CPU allocator and cuBLAS.
_OUT_OF_MEMORY = (
    " out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "PT_DEVMEM Allocation failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Collect garbage, cycles included, and return cached memory to the device or the system."""
    clear_device_cache(garbage_collection=True)
    if device.type == "cpu":
        # glibc keeps freed memory until malloc_trim; other C libraries do not have it.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def adam_state_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Memory of `device` that Adam's first step over `tensors` takes: two numbers for each."""
    return sum(2 * t.numel() * t.element_size() for t in tensors if t.device.type == device.type)


def free_bytes(device: torch.device) -> float:
    """Memory that this process can still allocate on its device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil  # a dependency of accelerate

    return min(float(psutil.virtual_memory().available), free_in_cgroup())


def free_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory left in this process's container, or inf without one; droppable page cache counts."""
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return float(most - taken + int(stat.get(cache, 0)))
    return math.inf


def memory_gb(device: torch.device) -> float:
    """Memory in use: allocated on the GPU, or resident for a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return _process_status("VmRSS")


def peak_gb(device: torch.device) -> float:
    """The most memory in use since `reset_peak`, counted as `memory_gb` counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _process_status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Start a new peak, if the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # A container may forbid it; the peak then counts from the start of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _process_status(key: str) -> float:
    """A size of this process from the kernel, in 10^9 bytes; without /proc, its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
        return kibibytes * 1024 / 1e9
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
