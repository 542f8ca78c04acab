"""Host memory of several processes, all together: what they hold that no file backs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.launching import ROOT, environment


def wait_to_begin(folder: Path, engine: Any) -> None:
    """In one of the processes: all are ready; return when `most_held` has looked at them."""
    engine.barrier()
    (folder / f"ready-{engine.rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


def linger(engine: Any) -> None:
    """In one of the processes: stay until what it holds has been seen."""
    engine.barrier()
    time.sleep(0.2)


def most_held(folder: Path, processes: int, module: str, *arguments: object) -> int:
    """The most bytes that processes of `module` held after `wait_to_begin(folder, ...)` beside what
    they held before; sampled every 5 ms."""
    for mark in ("go", *(f"ready-{rank}" for rank in range(processes))):
        (folder / mark).unlink(missing_ok=True)
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", "-m", module, *map(str, arguments)),
        ],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS=1, MALLOC_TRIM_THRESHOLD_=0),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not all((folder / f"ready-{rank}").exists() for rank in range(processes)):
        assert launched.poll() is None, "a process failed"
        time.sleep(0.05)
    pids = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    before = most = _held(pids)
    (folder / "go").touch()
    while launched.poll() is None:
        most = max(most, _held(pids))
        time.sleep(0.005)
    assert launched.returncode == 0, "a process failed"
    return most - before


def _held(pids: list[str]) -> int:
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        total += 1024 * int(found[0]) if found else 0
    return total
