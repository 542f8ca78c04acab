"""Starting `train` under a launch configuration, through `accelerate launch`, and seeing it to its
end.

Each process writes a log of its own; rank 0's is shown as it grows. A failure is shown in the words
of the process that failed first. A signal is passed on to the processes, which save and stop.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.rank import (
    RankStatus,
    follow_parent,
    forget_statuses,
    log_of,
    read_statuses,
)

LAUNCHER_LOG = "launcher.log"
STOPPED_AND_SAVED = 75
LOOK_EVERY = 0.1  # seconds
ASK_AGAIN = 2.0  # seconds; a process that is still importing has not heard the first time
_GRACE = 60.0  # seconds for processes to save in whose launcher is gone
_LAST_LINES = 40


@dataclass(frozen=True)
class NodePlacement:
    """Where this launcher stands among the nodes, and where the processes meet."""

    machine_rank: int = 0
    num_machines: int = 1
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def check(self) -> None:
        """Raise a ConfigError unless the processes can meet here."""
        if not 0 <= self.machine_rank < self.num_machines:
            raise ConfigError(
                f"machine_rank={self.machine_rank} is no node of num_machines={self.num_machines}; "
                f"give 0 to {self.num_machines - 1}"
            )
        port = self.main_process_port
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"main_process_port={port} is not a port; give 1024 to 65535")
        if self.num_machines > 1 and (self.main_process_ip is None or port is None):
            raise ConfigError(
                f"{self.num_machines} nodes must know where to meet; give --main-process-ip (the "
                "first node) and "
                "--main-process-port, the same on each, and --machine-rank"
            )
        if port is not None and self.machine_rank == 0:
            _check_free(port)

    def arguments(self) -> list[str]:
        """For accelerate's launcher. On one machine a free port is chosen."""
        port = self.main_process_port or free_port()
        given = ["--num_machines", str(self.num_machines), "--machine_rank", str(self.machine_rank)]
        if self.main_process_ip is not None:
            given += ["--main_process_ip", self.main_process_ip]
        return [*given, "--main_process_port", str(port)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"main_process_port={port} cannot be used here: {error.strerror}; give another, or "
                "on one machine none"
            ) from None


def launch(
    config: Path,
    place: NodePlacement,
    train: Sequence[str],
    logs: Path,
    deepspeed_file: Path | None = None,
) -> int:
    """Run `train` with the arguments `train` under the accelerate configuration `config`.

    Args:
        config: the accelerate configuration.
        place: this node among the nodes.
        train: arguments of `train`; must name the run directory.
        logs: folder for the logs; made.
        deepspeed_file: the DeepSpeed configuration that `config` names, wherever it was found.

    Returns:
        The exit status: 0 done, 75 stopped by a signal after saving, 2 wrong input, 1 anything
        else.
    """
    made = make_folder(logs)
    forget_statuses(logs, place.machine_rank)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        *place.arguments(),
    ]
    if deepspeed_file is not None:
        command += ["--deepspeed_config_file", str(deepspeed_file)]
    command += ["-m", "accum_trainer.launch.rank", str(logs), str(place.machine_rank), "--", *train]
    watch = _Watch(logs, place.machine_rank)
    with open(logs / LAUNCHER_LOG, "a") as output, stopping() as stopped:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _terminal(),
            start_new_session=True,  # Ctrl-C is for us alone, to be passed on in order
            preexec_fn=follow_parent,
        )
        try:
            _see_through(process, watch, stopped)
            watch.let_end()
        finally:
            watch.tell(signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            watch.show()
    try:
        status = watch.verdict(process.returncode, bool(stopped))
    finally:
        forget_statuses(logs, place.machine_rank)
    if status == 2 and logs in made:  # refused: leave nothing
        for file in logs.iterdir():
            file.unlink()
        remove_folders(made)
    return status


def make_folder(path: Path) -> list[Path]:
    """Make the folder and its parents; returns those that were not there, innermost first."""
    missing = [folder for folder in [path, *path.absolute().parents] if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {path} cannot be made: {error.strerror}; name another output_dir"
        ) from None
    return missing


def remove_folders(made: list[Path]) -> None:
    """Take back `make_folder`, but for what holds something by now."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _terminal() -> dict[str, str]:
    """Have rank 0, whose output goes through a file, draw what suits the screen that it ends on."""
    if not sys.stderr.isatty():
        return {}
    return {"FORCE_COLOR": "1", "COLUMNS": str(os.get_terminal_size(sys.stderr.fileno()).columns)}


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect the signals that ask to stop; a second Ctrl-C interrupts at once."""
    stopped: list[int] = []

    def handler(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {
        number: signal.signal(number, handler)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield stopped
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _see_through(process: subprocess.Popen[bytes], watch: _Watch, stopped: list[int]) -> None:
    asked = 0.0
    while process.poll() is None:
        time.sleep(LOOK_EVERY)
        watch.show()
        if stopped and time.monotonic() - asked > ASK_AGAIN:
            asked = time.monotonic()
            if not watch.tell(signal.SIGTERM):
                process.terminate()  # none runs, or not yet: nothing to save


class _Watch:
    """The processes of this node: shows rank 0's log as it grows, passes a stop on, and says how
    they ended."""

    def __init__(self, logs: Path, node: int) -> None:
        self._logs, self._node = logs, node
        self._screen = log_of(logs, 0)
        self._shown = self._screen.stat().st_size if self._screen.exists() else 0
        launcher = logs / LAUNCHER_LOG
        self._launcher_begins = launcher.stat().st_size if launcher.exists() else 0
        self._begins = {file.name: file.stat().st_size for file in logs.glob("rank-*.log")}

    def show(self) -> None:
        if self._node != 0 or not self._screen.exists():
            return
        with open(self._screen, "rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        sys.stderr.write(new.decode(errors="replace"))
        sys.stderr.flush()

    def let_end(self) -> None:
        """The launcher is gone: let what it left behind save and stop."""
        deadline = time.monotonic() + _GRACE
        self.tell(signal.SIGTERM)
        while self.tell(0) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
            self.show()

    def tell(self, number: int) -> bool:
        """Send a signal (0: none) to each process of this node that runs; False where none does."""
        told = False
        for process in read_statuses(self._logs, self._node):
            if process.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                    told = True
        return told

    def verdict(self, launcher_status: int, stopped: bool) -> int:
        """The exit status of the whole; where it is a failure that rank 0 has not told already,
        says whose and what."""
        ended = read_statuses(self._logs, self._node)
        if launcher_status == 0 and all(process.status == 0 for process in ended):
            return 0
        failed = [
            process for process in ended if process.status not in (0, STOPPED_AND_SAVED, None)
        ]
        saved = any(process.status == STOPPED_AND_SAVED for process in ended)
        if not failed and (stopped or saved):
            return STOPPED_AND_SAVED
        first = min(failed, key=lambda process: process.ended or 0.0, default=None)
        silent = [process for process in ended if process.status is None]
        if any(process.status == 2 for process in failed):
            first = next(process for process in failed if process.status == 2)
        elif silent and self._killed(silent):
            raise AccumTrainerError(self._killed(silent))
        if first is None:
            raise AccumTrainerError(
                f"accelerate's launcher ended with status {launcher_status}; its last words "
                f"({self._logs / LAUNCHER_LOG}):\n"
                + self._last_words(self._logs / LAUNCHER_LOG, self._launcher_begins)
            )
        if first.rank != 0:
            log = log_of(self._logs, first.rank)
            print(
                f"process {first.rank} of this training failed first, with status {first.status} "
                f"({log}):\n" + self._last_words(log, self._begins.get(log.name, 0)),
                file=sys.stderr,
            )
        return 2 if first.status == 2 else 1

    def _killed(self, silent: list[RankStatus]) -> str:
        """A message where the launcher saw a process die of a signal that was not its own doing."""
        with open(self._logs / LAUNCHER_LOG, errors="replace") as file:
            file.seek(self._launcher_begins)
            text = file.read()
        # torchrun's summary of the first failure; -9 is what the kernel does when memory runs out.
        root = text.rpartition("Root Cause")[2]
        found = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", root, re.DOTALL)
        if found is None:
            return ""
        rank, number = int(found[1]), int(found[2])
        name = signal.Signals(number).name
        why = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return (
            f"process {rank} was killed by {name}{why}; the same command continues from the last "
            "checkpoint "
            f"(log: {log_of(self._logs, rank)})"
        )

    def _last_words(self, log: Path, begin: int) -> str:
        """Its own error line, or its last traceback, or its last lines."""
        if not log.exists():
            return "(it wrote nothing)"
        with open(log, errors="replace") as file:
            file.seek(begin)
            lines = file.read().splitlines()
        said = [line for line in lines if line.startswith("error")]
        if said:
            return said[-1]
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
        return "\n".join((lines[starts[-1] :] if starts else lines)[-_LAST_LINES:])
