"""Real runs of `train`, and the faults that `benchmarks/chaos.py` brings on them.

Knows how to start a run and how to break it; not what must become of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from accum_trainer.train.checkpoint_folder import list_checkpoints
from accum_trainer.train.records import read_records
from tests.launching import Completed, forked

UPDATES, EVERY = 8, 2
COMMAND = (
    *("--cpu", "--batch-size", "2", "--max-seq-len", "64", "--lr", "1e-2"),
    *("--global-batch-size", "8", "--steps", str(UPDATES), "--checkpoint-every", str(EVERY)),
    *("--output-dir", "run", "--lora-dropout", "0.3", "--use-peft"),
)
# name -> (processes, options of train, environment)
KINDS: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
    "single": (1, (), {}),
    "ddp": (2, (), {}),
    "zero2": (2, ("--zero-stage", "zero2"), {}),
    "fsdp2": (2, (), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
}
LIMIT = 120.0  # seconds for one start; longer is a hang


class Job:
    """One start of a run in `folder`, going on in a thread; killed after `limit` seconds."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        *more: str,
        inject: dict[str, int] | None = None,
        limit: float = LIMIT,
    ) -> None:
        self.kind = kind
        processes, options, environment = KINDS[kind]
        self.folder, self.run = folder, folder / "run"
        self.finished: Completed | None = None
        self.hung = False

        def start() -> None:
            try:
                self.finished = forked(
                    *(processes, "accum_trainer", "train", *COMMAND, *options, *more),
                    launcher=processes > 1, timeout=limit, cwd=folder, inject=inject, **environment,
                )  # fmt: skip
            except subprocess.TimeoutExpired:  # the processes were killed
                self.hung = True

        self.thread = threading.Thread(target=start)
        self.thread.start()

    def processes(self) -> list[psutil.Process]:
        """All that work in the folder, loader workers included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.pid != psutil.Process().pid:
                    found.append(process)
        return found

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def wait(self) -> None:
        self.thread.join()

    @property
    def status(self) -> int:
        return self.finished.returncode if self.finished else -1

    @property
    def err(self) -> str:
        return self.finished.stderr if self.finished else ""


# Breaks a run; returns when it has ended, and whether the fault reached it before.
Act = Callable[[Job, random.Random], bool]


@dataclass(frozen=True)
class Fault:
    """One way to break a run.

    Attributes:
        says: it, in words.
        act: brings it about.
        inject: built into every start of the run (`tests/forkserver.py`), of the undisturbed one
            too.
        takes_several: it takes a run on several processes.
    """

    says: str
    act: Act
    inject: dict[str, int] | None = None
    takes_several: bool = False


def _moment(job: Job, rng: random.Random) -> bool:
    """Wait for a random moment of training, in a save as likely as between saves; False if the run
    ended before."""
    if rng.random() < 0.5:  # at a save
        seen = rng.randint(1, UPDATES // EVERY)
        names = (f".partial-step-{seen * EVERY:08d}", f"step-{seen * EVERY:08d}")
        until = time.monotonic() + LIMIT
        while job.is_alive() and time.monotonic() < until:
            if any((job.run / "checkpoints" / name).exists() for name in names):
                time.sleep(rng.random() * 0.02)
                return job.is_alive()
            time.sleep(0.001)
        return False
    wanted = rng.randint(0, UPDATES - 1)
    while job.is_alive() and len(read_records(job.run / "metrics.jsonl")) < wanted:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    return job.is_alive()


def _signal_one(number: int) -> Act:
    def act(job: Job, rng: random.Random) -> bool:
        hit = False
        if _moment(job, rng) and (found := job.processes()):
            with contextlib.suppress(psutil.Error):
                rng.choice(found).send_signal(number)
                hit = True
        job.wait()
        return hit

    return act


def _freeze(job: Job, rng: random.Random) -> bool:
    hit = False
    if _moment(job, rng) and (found := job.processes()):
        one = rng.choice(found)
        with contextlib.suppress(psutil.Error):
            one.suspend()
            hit = True
            time.sleep(2 * rng.random())
            one.resume()
    job.wait()
    return hit


def _kill_all(job: Job, rng: random.Random) -> bool:
    hit = False
    if _moment(job, rng):
        for process in job.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
                hit = True
    job.wait()
    return hit


def _files(job: Job) -> list[Path]:
    return sorted(path for path in job.run.rglob("*") if path.is_file() and path.stat().st_size)


def _flip(job: Job, rng: random.Random) -> bool:
    hit = _kill_all(job, rng)
    if found := _files(job):
        path = rng.choice(found)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return hit and bool(found)


def _truncate(job: Job, rng: random.Random) -> bool:
    hit = _kill_all(job, rng)
    if found := _files(job):
        path = rng.choice(found)
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return hit and bool(found)


def _delete(job: Job, rng: random.Random) -> bool:
    hit = _kill_all(job, rng)
    if found := _files(job):
        rng.choice(found).unlink()
    return hit and bool(found)


def _wipe_newest(job: Job, rng: random.Random) -> bool:
    hit = _kill_all(job, rng)
    if found := list_checkpoints(job.run / "checkpoints"):
        shutil.rmtree(found[-1])
    return hit and bool(found)


def _full_disk(job: Job, rng: random.Random) -> bool:
    """The kernel refuses every file above a few kilobytes for a while."""
    limited: list[tuple[psutil.Process, tuple[int, int]]] = []
    if _moment(job, rng):
        for process in job.processes():
            with contextlib.suppress(psutil.Error):
                limited.append((process, process.rlimit(psutil.RLIMIT_FSIZE)))
                process.rlimit(psutil.RLIMIT_FSIZE, (rng.choice([100, 3000, 50_000]), -1))
        time.sleep(3 * rng.random())
        for process, before in limited:
            with contextlib.suppress(psutil.Error):
                process.rlimit(psutil.RLIMIT_FSIZE, before)
    job.wait()
    return bool(limited)


def _second_start(job: Job, rng: random.Random) -> bool:
    hit = _moment(job, rng)
    if hit:
        # The same engine: if the first has not locked the folder yet, the second is the run.
        second = Job(job.kind, job.folder)
        second.wait()
    job.wait()
    return hit


def _read_only(job: Job, rng: random.Random) -> bool:
    """The run directory, or that of its checkpoints, takes no new file for a while."""
    hit = _moment(job, rng)
    folder = job.run / rng.choice([".", "checkpoints"])
    if hit and folder.is_dir():
        with _without_new_files(folder):
            time.sleep(3 * rng.random())
    job.wait()
    return hit


@contextlib.contextmanager
def _without_new_files(folder: Path) -> Iterator[None]:
    """A folder that its owner cannot write to, inside. Modes do not hold root up; the attribute
    `immutable` of a file system does.

    Raises:
        RuntimeError: nothing here makes a folder read-only.
    """
    mode = folder.stat().st_mode
    is_root = os.geteuid() == 0
    if is_root:
        _set_immutable(folder, True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if is_root:
            _set_immutable(folder, False)
        else:
            folder.chmod(mode)


def _set_immutable(folder: Path, value: bool) -> None:
    command = ["chattr", "+i" if value else "-i", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise RuntimeError(
            f"{folder} cannot be made read-only for root ({said}); run as another user, or in a "
            "TMPDIR whose file system has `chattr +i`"
        ) from None


def _broken_connection(job: Job, rng: random.Random) -> bool:
    """Shut down one connection between two processes of the job, as a network does that breaks:
    one that gradients go through, or that to the store where they met."""
    hit = False
    if _moment(job, rng):
        mine = {process.pid: process for process in job.processes()}
        ends = []
        for process in mine.values():
            with contextlib.suppress(psutil.Error):
                ends += [
                    (process.pid, one)
                    for one in process.net_connections("tcp")
                    if one.status == psutil.CONN_ESTABLISHED and one.fd >= 0
                ]
        here = {one.laddr for _, one in ends}
        ends = [(pid, one) for pid, one in ends if one.raddr in here]
        rng.shuffle(ends)
        for pid, one in ends[:1]:
            with contextlib.suppress(ProcessLookupError, OSError):
                with _socket_of(pid, one.fd) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                hit = True
    job.wait()
    return hit


_PIDFD_GETFD = 438  # the number of the system call, on every architecture


def _socket_of(pid: int, descriptor: int) -> socket.socket:
    """A duplicate of another process's socket. OSError if the system does not give it."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        found = libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return socket.socket(fileno=found)


def unavailable() -> dict[str, str]:
    """Fault -> why this machine does not allow it."""
    found = {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="chaos-") as place,
            _without_new_files(Path(place)),
            contextlib.suppress(OSError),
        ):
            (Path(place) / "file").touch()
            found["read-only"] = f"{place} can be written to all the same"
    except RuntimeError as error:
        found["read-only"] = str(error)
    try:
        with socket.socket() as mine, _socket_of(os.getpid(), mine.fileno()):
            pass
    except (OSError, AttributeError) as error:
        found["broken connection"] = f"pidfd_getfd gives no other process's socket ({error})"
    return found


FAULTS = {
    "kill one": Fault("SIGKILL to one process", _signal_one(signal.SIGKILL)),
    "kill all": Fault("SIGKILL to all, as if the plug were pulled", _kill_all),
    "terminate one": Fault("SIGTERM to one process", _signal_one(signal.SIGTERM)),
    "interrupt one": Fault("SIGINT to one process", _signal_one(signal.SIGINT)),
    "freeze one": Fault("SIGSTOP to one process for up to two seconds", _freeze),
    "flip a bit": Fault("all killed, then one bit of one file in the run directory", _flip),
    "truncate": Fault("all killed, then one file cut short", _truncate),
    "delete": Fault("all killed, then one file deleted", _delete),
    "wipe newest": Fault("all killed, then the newest checkpoint deleted", _wipe_newest),
    "full disk": Fault("the kernel refuses larger files for up to three seconds", _full_disk),
    "second start": Fault("the same command again while it runs", _second_start),
    "read-only": Fault("a directory that takes no files for up to three seconds", _read_only),
    "broken connection": Fault(
        "a connection between two processes is cut", _broken_connection, takes_several=True
    ),
    "nan": Fault(
        "gradients of some micro-batches are NaN on one process; then all killed",
        _kill_all,
        inject={"nan": 12},
    ),
}
