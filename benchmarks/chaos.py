"""Break real runs in random ways, continue them, and compare them with an undisturbed run.

    python benchmarks/chaos.py --trials 300 [--seed 0] [--kinds single ddp zero2 fsdp2]

A trial starts `accum-trainer train` on one process or two, does one thing to it at a random moment,
then gives the same command again until the run is done. Its weights must be those of the
undisturbed run to the bit and its records each update once. `FAULTS` describes the faults. One that
this machine does not allow is named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from accum_trainer.train.checkpoint_folder import list_checkpoints, newest_whole
from accum_trainer.train.records import read_records
from tests.launching import Completed, forked, script

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
ADAPTER = "adapter_model.safetensors"
MOST_STARTS = 6  # until a run must be done
LIMIT = 120.0  # seconds for one start; longer is a hang
TIMED = (
    *("tokens_per_sec", "samples_per_sec", "step_time_sec", "data_wait_sec"),
    *("memory_gb", "peak_gb"),
)


# What every start of a run has in it, by fault; the undisturbed run too.
INJECTED: dict[str, dict[str, int]] = {"nan": {"nan": 12}}


class Job:
    """One start of a run in `folder`, going on in a thread."""

    def __init__(
        self, kind: str, folder: Path, *more: str, inject: dict[str, int] | None = None
    ) -> None:
        processes, options, environment = KINDS[kind]
        self.folder, self.run = folder, folder / "run"
        self.finished: Completed | None = None
        self.hung = False

        def start() -> None:
            try:
                self.finished = forked(
                    *(processes, "accum_trainer", "train", *COMMAND, *options, *more),
                    launcher=processes > 1, timeout=LIMIT, cwd=folder, inject=inject, **environment,
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


# Does one thing to a run; whether it reached the run before its end.
Fault = Callable[[Job, random.Random], bool]


@dataclass
class Trial:
    """What became of one run.

    Attributes:
        wrong: what must not be; empty if all was right.
        hit: the fault reached the run before its end.
        starts: how often the command was given.
        refused: it was refused with the remedy, which was then taken.
        records_changed: it said that metrics.jsonl is not what was written.
        lost: updates that were made again though a whole checkpoint had them.
    """

    fault: str
    kind: str
    wrong: list[str] = field(default_factory=list)
    hit: bool = False
    starts: int = 0
    refused: bool = False
    records_changed: bool = False
    lost: int = 0


# --- the faults: each returns when the job has ended, and whether it reached the run before ---


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


def _signal_one(number: int) -> Fault:
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
        second = Job(rng.choice(["single", "ddp"]), job.folder)
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


FAULTS: dict[str, tuple[Fault, str]] = {
    "kill one": (_signal_one(signal.SIGKILL), "SIGKILL to one process"),
    "kill all": (_kill_all, "SIGKILL to all, as if the plug were pulled"),
    "terminate one": (_signal_one(signal.SIGTERM), "SIGTERM to one process"),
    "interrupt one": (_signal_one(signal.SIGINT), "SIGINT to one process"),
    "freeze one": (_freeze, "SIGSTOP to one process for up to two seconds"),
    "flip a bit": (_flip, "all killed, then one bit of one file in the run directory"),
    "truncate": (_truncate, "all killed, then one file cut short"),
    "delete": (_delete, "all killed, then one file deleted"),
    "wipe newest": (_wipe_newest, "all killed, then the newest checkpoint deleted"),
    "full disk": (_full_disk, "the kernel refuses larger files for up to three seconds"),
    "second start": (_second_start, "the same command again while it runs"),
    "read-only": (_read_only, "a directory that takes no files for up to three seconds"),
    "broken connection": (_broken_connection, "a connection between two processes is cut"),
    "nan": (_kill_all, "gradients of some micro-batches are NaN on one process; then all killed"),
}


def trial(fault: str, kind: str, reference: Path, seed: int) -> Trial:
    """Break one run, continue it until it is done, and compare it."""
    found, rng = Trial(fault, kind), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        folder = Path(place).resolve()
        inject = INJECTED.get(fault)
        job = Job(kind, folder, inject=inject)
        found.hit = FAULTS[fault][0](job, rng)
        while _look_at(job, found) and found.starts < MOST_STARTS:
            before = _newest_step(job.run)
            more = ("--resume", "anew") if "resume=anew" in job.err else ()
            found.refused = found.refused or bool(more)
            job = Job(kind, folder, *more, inject=inject)
            job.wait()
            first = [line for line in job.err.splitlines() if "continued from" in line]
            if first and not more:
                after = int(first[0].split(" after ")[1].split()[0])
                found.lost += max(0, before - after)
        if not _is_done(job.run):
            found.wrong.append(f"not done after {found.starts} starts: {job.err[-600:]}")
        else:
            found.wrong += _differences(job.run, reference, found.records_changed)
    return found


def _look_at(job: Job, found: Trial) -> bool:
    """Judge how a start ended; whether another one is needed."""
    found.starts += 1
    found.records_changed = found.records_changed or "some line was changed" in job.err
    if job.hung:
        found.wrong.append(f"hung: {job.err[-600:]}")
    # A process whose peer was killed may end in any way; one that was not disturbed may not.
    if found.starts > 1 and "Traceback" in job.err:
        found.wrong.append(f"traceback in start {found.starts}: {job.err[-1500:]}")
    return not _is_done(job.run)


def _is_done(run: Path) -> bool:
    try:
        return bool(json.loads((run / "result.json").read_text())["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _newest_step(run: Path) -> int:
    newest = newest_whole(run / "checkpoints")
    return int(newest.name.removeprefix("step-")) if newest else 0


def _differences(run: Path, reference: Path, records_changed: bool) -> Iterator[str]:
    """Weights that are not those of the reference to the bit; records that are not its, unless the
    run has said so."""
    ours, theirs = (_weights(path / "model" / ADAPTER) for path in (run, reference))
    if ours.keys() != theirs.keys():
        yield f"weights have other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
        return
    differing = [name for name in ours if not (ours[name] == theirs[name]).all()]
    if differing:
        yield f"{len(differing)} of {len(ours)} weights differ, such as {differing[0]}"
    mine, its = (
        [
            {k: v for k, v in record.items() if k not in TIMED}
            for record in read_records(path / "metrics.jsonl")
        ]
        for path in (run, reference)
    )
    if mine != its:
        steps = [record["step"] for record in mine]
        # A line of metrics.jsonl that was destroyed is lost, which is said; none may come twice.
        changed = any(record not in its for record in mine) and not records_changed
        if changed or len(set(steps)) < len(steps):
            yield f"records differ: updates {steps}"


def _weights(path: Path) -> dict[str, Any]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def reference(kind: str, fault: str, folder: Path) -> Path:
    """An undisturbed run of `kind`, with what the fault has in it; made once in `folder`.

    Raises:
        SystemExit: it failed, or an injected fault did not come.
    """
    inject = INJECTED.get(fault)
    place = folder / (f"{kind}-{fault}" if inject else kind)
    if not place.exists():
        place.mkdir()
        job = Job(kind, place.resolve(), inject=inject)
        job.wait()
        if job.status != 0:
            raise SystemExit(f"the undisturbed run of {kind} failed: {job.err[-2000:]}")
        skipped = [
            one["step"] for one in read_records(place / "run/metrics.jsonl") if one["skipped"]
        ]
        if bool(skipped) != bool(inject):
            raise SystemExit(f"the undisturbed run of {kind} skipped the windows {skipped}")
    return place / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    # From this thread: the process that all others are forked from ends with its first thread.
    script("pass", Path.cwd())
    trials: list[Trial] = []
    faults = list(options.faults)
    for fault, reason in unavailable().items():
        if fault in faults:
            faults.remove(fault)
            print(f"left out: {fault}: {reason}", flush=True)
    several = [kind for kind in options.kinds if KINDS[kind][0] > 1]
    if not several and "broken connection" in faults:
        faults.remove("broken connection")
        print("left out: broken connection: no kind has several processes", flush=True)
    if not faults:
        raise SystemExit("no fault is left")
    with tempfile.TemporaryDirectory(prefix="chaos-reference-") as place:
        for number in range(options.trials):
            fault = faults[number % len(faults)]
            kind = rng.choice(several if fault == "broken connection" else options.kinds)
            known = reference(kind, fault, Path(place))
            one = trial(fault, kind, known, rng.randrange(2**31))
            trials.append(one)
            words = "; ".join(one.wrong) or "whole"
            met = "hit" if one.hit else "missed"
            print(f"{number + 1}: {fault}, {kind}, {met}, {one.starts} starts: {words}", flush=True)
    print("\n".join(table(trials)))
    return int(any(one.wrong for one in trials))


def table(trials: list[Trial]) -> list[str]:
    """Markdown: per fault, what was seen."""
    lines = [
        "| fault | trials | starts | refused with the remedy | updates lost beyond the last "
        "checkpoint | wrong |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault, (_, words) in FAULTS.items():
        those = [one for one in trials if one.fault == fault]
        if those:
            lines.append(
                f"| {words} | {len(those)} | {sum(t.starts for t in those)} | "
                f"{sum(t.refused for t in those)} | {sum(t.lost for t in those)} | "
                f"{sum(bool(t.wrong) for t in those)} |"
            )
    kinds = Counter(one.kind for one in trials)
    missed = sum(not one.hit for one in trials)
    lines += ["", "Runs: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + "."]
    lines += [f"In {missed} of them the run had ended before the fault."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
