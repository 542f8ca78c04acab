"""One process of a launched training: `python -m accum_trainer.launch.rank LOGS NODE --
TRAIN-ARGS`.

accelerate's launcher starts it. It sends its output to its own log and writes a status file,
because torchrun turns every failure into status 1. Knows nothing of the training it runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RankStatus:
    """One process: its exit status (None while it runs), and when it ended, in seconds since the
    epoch."""

    rank: int
    pid: int
    status: int | None = None
    ended: float | None = None

    def write(self, logs: Path, node: int) -> None:
        partial = logs / f".node-{node}-rank-{self.rank}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(logs / f"node-{node}-rank-{self.rank}.json")


def read_statuses(logs: Path, node: int) -> list[RankStatus]:
    """The processes that this node's launcher started, by rank."""
    files = logs.glob(f"node-{node}-rank-*.json")
    return sorted(
        (RankStatus(**json.loads(file.read_text())) for file in files),
        key=lambda status: status.rank,
    )


def forget_statuses(logs: Path, node: int) -> None:
    """Delete the status files of an earlier start."""
    for file in logs.glob(f"node-{node}-rank-*.json"):
        file.unlink()


def log_of(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def follow_parent() -> None:
    """Get SIGTERM when the parent ends, and ignore SIGUSR1 until a handler is set.

    Otherwise a training whose launcher was killed would continue, and a second start would write
    into the same folder. torchrun has no handler for SIGUSR1, which batch systems send, and would
    die of it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def main(logs: Path, node: int, train: Callable[[], None]) -> None:
    """Run `train`, which raises SystemExit at its end, as one process of node `node`."""
    follow_parent()
    rank = int(os.environ.get("RANK", "0"))
    log = os.open(log_of(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    running = RankStatus(rank, os.getpid())
    running.write(logs, node)
    status = 1
    try:
        train()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        raise
    finally:
        RankStatus(rank, running.pid, status, time.time()).write(logs, node)


if __name__ == "__main__":
    from accum_trainer.cli import main as command_line

    main(Path(sys.argv[1]), int(sys.argv[2]), lambda: command_line(["train", *sys.argv[4:]]))
