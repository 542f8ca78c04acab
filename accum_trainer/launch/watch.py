"""Watch the processes of one node: show rank 0's log, pass signals on, report how they ended.

Reads the logs and status files that each process writes (`rank`), and torchrun's summary for one
fact only it knows: the signal that killed a process.

Why not torch elastic's `@record` and torchrun's `--log_dir` (torch 2.13)? An error file holds no
SystemExit, so wrong input (status 2) has none and torchrun calls the peer that lost its connection
the root cause. Its timestamps are whole seconds, too coarse to order a failure and the loss of a
peer. A killed process leaves none. Exit statuses still become 1. And `--log_dir` splits each log
into stdout and stderr, under a random name for each start.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accum_trainer.errors import AccumTrainerError
from accum_trainer.launch.rank import RankStatus, log_of, read_statuses
from accum_trainer.launch.signals import POLL_INTERVAL_SEC, STOPPED_AND_SAVED

LAUNCHER_LOG = "launcher.log"
_GRACE_SEC = 60.0  # for processes without a launcher to save
_LAST_LINES = 40


class RankWatch:
    """The processes of node `node` that write to `logs`, from now on."""

    def __init__(self, logs: Path, node: int) -> None:
        self._logs, self._node = logs, node
        self._launcher_log = logs / LAUNCHER_LOG
        # A continued run appends to its logs: remember where this start begins.
        written = [self._launcher_log, *logs.glob("rank-*.log")]
        self._begins = {log: log.stat().st_size for log in written if log.exists()}
        self._shown = self._begins.get(log_of(logs, 0), 0)

    def show(self) -> None:
        """Print what rank 0 has written since the last call; on its own node only."""
        log = log_of(self._logs, 0)
        if self._node != 0 or not log.exists():
            return
        with open(log, "rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        sys.stderr.write(new.decode(errors="replace"))
        sys.stderr.flush()

    def send(self, number: int) -> bool:
        """Send a signal (0: none) to each running process; False if none is running."""
        sent = False
        for process in read_statuses(self._logs, self._node):
            if process.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                    sent = True
        return sent

    def stop_orphans(self) -> None:
        """After the launcher has ended: let processes that it left behind save and stop."""
        deadline = time.monotonic() + _GRACE_SEC
        self.send(signal.SIGTERM)
        while self.send(0) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_SEC)
            self.show()

    def exit_status(self, launcher_status: int, stopped: bool) -> int:
        """The exit status of the whole. If another process than rank 0 failed first, prints which
        one and its message.

        Raises:
            AccumTrainerError: a process was killed, or the launcher failed before any process.
        """
        ended = read_statuses(self._logs, self._node)
        if launcher_status == 0 and all(process.status == 0 for process in ended):
            return 0
        failed = [
            process for process in ended if process.status not in (0, STOPPED_AND_SAVED, None)
        ]
        saved = any(process.status == STOPPED_AND_SAVED for process in ended)
        if not failed and (stopped or saved):
            return STOPPED_AND_SAVED
        refused = next((process for process in failed if process.status == 2), None)
        if refused is None and any(process.status is None for process in ended):
            self._raise_if_killed()
        first = refused or min(failed, key=lambda process: process.ended or 0.0, default=None)
        if first is None:
            raise AccumTrainerError(
                f"accelerate's launcher ended with status {launcher_status}; its last lines "
                f"({self._launcher_log}):\n{self._last_words(self._launcher_log)}"
            )
        if first.rank != 0:
            self._print_failure(first)
        return 2 if first.status == 2 else 1

    def _raise_if_killed(self) -> None:
        """Raise if torchrun saw a process die of a signal before it stopped the others."""
        # The part about the first failure; -9 is SIGKILL.
        root = self._since_start(self._launcher_log).rpartition("Root Cause")[2]
        found = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", root, re.DOTALL)
        if found is None:
            return
        rank, name = int(found[1]), signal.Signals(int(found[2])).name
        why = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        raise AccumTrainerError(
            f"process {rank} was killed by {name}{why}; the same command continues from the last "
            f"checkpoint (log: {log_of(self._logs, rank)})"
        )

    def _print_failure(self, process: RankStatus) -> None:
        log = log_of(self._logs, process.rank)
        print(
            f"process {process.rank} of this training failed first, with status {process.status} "
            f"({log}):\n{self._last_words(log)}",
            file=sys.stderr,
        )

    def _last_words(self, log: Path) -> str:
        """Its error message, or its last traceback, or its last lines."""
        lines: Sequence[str] = self._since_start(log).splitlines()
        errors = [line for line in lines if line.startswith("error")]
        if errors:
            return errors[-1]
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
        return "\n".join((lines[starts[-1] :] if starts else lines)[-_LAST_LINES:])

    def _since_start(self, log: Path) -> str:
        if not log.exists():
            return "(it wrote nothing)"
        with open(log, errors="replace") as file:
            file.seek(self._begins.get(log, 0))
            return file.read()
