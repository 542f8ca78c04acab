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

import re
import signal
import sys
import time
from pathlib import Path

from accum_trainer.errors import AccumTrainerError
from accum_trainer.launch.last_words import last_words
from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.rank import RankStatus, log_of, read_statuses
from accum_trainer.launch.signals import POLL_INTERVAL_SEC, STOPPED_AND_SAVED

_GRACE_SEC = 60.0  # for processes without a launcher to save
_SCREEN = 100_000  # characters of what was printed that are kept


def launcher_log_of(logs: Path, node: int) -> Path:
    """Of accelerate's launcher on this node: nodes share the folder."""
    return logs / ("launcher.log" if node == 0 else f"launcher-{node}.log")


class NodesNotMet(AccumTrainerError):
    """The launcher of a node ended before any of its processes ran."""


class RankWatch:
    """The processes of this node that write to `logs` and their statuses to `statuses`, from now
    on."""

    def __init__(self, logs: Path, place: NodePlacement, statuses: Path) -> None:
        self._logs, self._node, self._statuses = logs, place.machine_rank, statuses
        self._is_only_node = place.num_machines == 1
        self._launcher_log = launcher_log_of(logs, place.machine_rank)
        # A continued run appends to its logs: remember where this start begins.
        written = [self._launcher_log, *logs.glob("rank-*.log")]
        self._begins = {log: log.stat().st_size for log in written if log.exists()}
        self._shown = self._begins.get(log_of(logs, 0), 0)
        self._screen = ""

    def show(self) -> None:
        """Print what rank 0 has written since the last call; on its own node only."""
        log = log_of(self._logs, 0)
        if self._node != 0 or not log.exists():
            return
        with open(log, "rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        self._print(new.decode(errors="replace"))

    def has_processes(self) -> bool:
        """Whether a process has been started; with several nodes, once these have met."""
        return bool(read_statuses(self._statuses))

    def all_ended_well(self) -> bool:
        """Whether each process is done, or was stopped and has saved."""
        ended = read_statuses(self._statuses)
        return all(process.status in (0, STOPPED_AND_SAVED) for process in ended)

    def send(self, number: int) -> bool:
        """Send a signal (0: none) to each running process; False if none is running."""
        sent = [process.send(number) for process in read_statuses(self._statuses)]  # all of them
        return any(sent)

    def stop_orphans(self) -> None:
        """After the launcher has ended: let processes that it left behind save and stop."""
        deadline = time.monotonic() + _GRACE_SEC
        self.send(signal.SIGTERM)
        while self.send(0) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_SEC)
            self.show()

    def exit_status(self, launcher_status: int, stopped_by: int | None) -> int:
        """The exit status of the whole. If another process than rank 0 failed first, prints which
        one and its message.

        Args:
            stopped_by: the signal that asked for a stop, if one did.

        Raises:
            NodesNotMet: there are several nodes, and the launcher ended before any process.
            AccumTrainerError: a process was killed, or the launcher failed before any process.
        """
        ended = read_statuses(self._statuses)
        if launcher_status == 0 and all(process.status == 0 for process in ended):
            return 0
        failed = [
            process for process in ended if process.status not in (0, STOPPED_AND_SAVED, None)
        ]
        if not failed and any(process.status == STOPPED_AND_SAVED for process in ended):
            return STOPPED_AND_SAVED
        if not failed and stopped_by is not None:
            name = signal.Signals(stopped_by).name
            print(
                f"stopped by {name}, and nothing was saved since this start; the same command "
                "starts again from the last checkpoint, if there is one",
                file=sys.stderr,
            )
            return 128 + stopped_by
        # The others fail because of the first: they lose it, and may take that for wrong input.
        first = min(failed, key=lambda process: process.ended or 0.0, default=None)
        if (first is None or first.status != 2) and any(p.status is None for p in ended):
            self._raise_if_killed()
        if first is None:
            log = self._since_start(self._launcher_log)
            said = (
                f"accelerate's launcher ended with status {launcher_status}; its last lines "
                f"({self._launcher_log}):\n{last_words(log)}"
            )
            # torchrun names a root cause where a process ran, if it left no status.
            if ended or self._is_only_node or "Root Cause" in log:
                raise AccumTrainerError(said)
            raise NodesNotMet(f"the nodes did not meet: {said}")
        if not self._is_shown(first):
            self._print_failure(first)
        return 2 if first.status == 2 else 1

    def remove_logs(self) -> None:
        """Delete the logs of a start that was refused, unless one holds an error that was not
        shown. Logs of other nodes and of earlier starts stay."""
        ended = read_statuses(self._statuses)
        if all(process.status in (2, None) and self._is_shown(process) for process in ended):
            for log in (self._launcher_log, *(log_of(self._logs, p.rank) for p in ended)):
                if self._begins.get(log, 0) == 0:
                    log.unlink(missing_ok=True)

    def _is_shown(self, process: RankStatus) -> bool:
        """Whether its error is on the screen, in its words or as another process repeated it."""
        if process.status is None or (process.rank == 0 and self._node == 0):
            return True
        # "error (process 1): ..." there is "error: process 1 on HOST: ..." here.
        message = last_words(self._since_start(log_of(self._logs, process.rank))).partition(": ")[2]
        return bool(message) and message in self._screen

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
        words = last_words(self._since_start(log)) or "(it wrote nothing)"
        # Another node's process may have failed before, and this one have lost it: their clocks
        # and what they say do not tell.
        first = (
            "of this training failed first"
            if self._is_only_node
            else f"was the first to fail on node {self._node} (for what another node's processes "
            "said before, see their logs)"
        )
        self._print(
            f"process {process.rank} {first}, with status {process.status} ({log}):\n{words}\n"
        )

    def _print(self, text: str) -> None:
        self._screen = (self._screen + text)[-_SCREEN:]
        sys.stderr.write(text)
        sys.stderr.flush()

    def _since_start(self, log: Path) -> str:
        if not log.exists():
            return "(it wrote nothing)"
        with open(log, errors="replace") as file:
            file.seek(self._begins.get(log, 0))
            return file.read()
