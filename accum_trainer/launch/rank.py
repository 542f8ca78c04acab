"""One process of a launched training: `python -m accum_trainer.launch.rank LOGS STATUSES --
TRAIN-ARGS`.

accelerate's launcher starts it. It sends its output to its own log and writes a status file,
because torchrun turns every failure into status 1. Knows nothing of the training it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from accum_trainer.launch.folders import private
from accum_trainer.launch.process import send_signal, start_of

# In a launched process: its pid, and where its status belongs.
_STATUSES = "_ACCUM_TRAINER_STATUSES"


@dataclass(frozen=True)
class RankStatus:
    """One process: its exit status (None while it runs), and when it ended, in seconds since the
    epoch. `start` tells it from a later process with its `pid` (`process.start_of`)."""

    rank: int
    pid: int
    start: int | None
    status: int | None = None
    ended: float | None = None

    def write(self, statuses: Path) -> None:
        partial = statuses / f"rank-{self.rank}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(statuses / f"rank-{self.rank}.json")

    def send(self, number: int) -> bool:
        """Send it a signal (0: none); False if it is not running."""
        if self.status is not None or self.start is None:
            return False
        return send_signal(self.pid, self.start, number)


def make_statuses(logs: Path) -> Path:
    """Make this launcher's folder for the statuses of its processes: nobody else writes there.

    Its name holds the host and the launcher, so that folders of launchers that were killed can be
    removed. It is in `logs`, because a folder for temporary files may be cleaned in a long run.
    """
    # No host name holds a plus sign.
    of_this_host = f".processes-{socket.gethostname()}+"
    for folder in logs.glob(f"{of_this_host}*"):
        pid, start = folder.name.removeprefix(of_this_host).split("+")[:2]
        if str(start_of(int(pid))) != start:
            shutil.rmtree(folder, ignore_errors=True)
    mine = f"{of_this_host}{os.getpid()}+{start_of(os.getpid())}+"
    return Path(tempfile.mkdtemp(prefix=mine, dir=logs))


def read_statuses(statuses: Path) -> list[RankStatus]:
    """The processes that this launcher started, by rank."""
    return sorted(
        (RankStatus(**json.loads(file.read_text())) for file in statuses.glob("rank-*.json")),
        key=lambda status: status.rank,
    )


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


def end_at_once(status: int) -> NoReturn:
    """End this process from any thread, even while others are blocked in a library; leave the
    status where its launcher looks for it."""
    pid, _, statuses = os.environ.get(_STATUSES, "").partition(" ")
    if pid == str(os.getpid()):
        rank = int(os.environ.get("RANK", "0"))
        ended = RankStatus(rank, os.getpid(), start_of(os.getpid()), status, time.time())
        with contextlib.suppress(OSError):
            ended.write(Path(statuses))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(logs: Path, statuses: Path, train: Callable[[], None]) -> None:
    """Run `train`, which raises SystemExit at its end, as one process of a launcher."""
    follow_parent()
    rank = int(os.environ.get("RANK", "0"))
    running = RankStatus(rank, os.getpid(), start_of(os.getpid()))
    running.write(statuses)
    log = private(str(log_of(logs, rank)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ[_STATUSES] = f"{running.pid} {statuses}"
    status = 1
    try:
        train()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        raise
    finally:
        with contextlib.suppress(OSError):  # a launcher that was killed does not read it
            replace(running, status=status, ended=time.time()).write(statuses)


if __name__ == "__main__":
    from accum_trainer.cli import main as command_line

    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        lambda: command_line(["train", *sys.argv[4:]], shares_terminal=False),
    )
