"""The lock of a run directory: one process trains there, and a lock whose owner is dead does not
hold."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.process import start_of
from accum_trainer.train import run_lock
from accum_trainer.train.run_lock import LOCK, RunLock
from tests.launching import ROOT, environment


def locked_by(folder, **owner):
    path = folder / LOCK
    here = {"host": socket.gethostname(), "machine": run_lock.this_machine()}
    owner = (here if owner.get("host") == here["host"] else {}) | owner
    path.write_text(json.dumps({"since": "2026-01-01 00:00:00", "id": "1"} | owner))
    return path


# Take the lock of a folder and hold it until standard input ends.
HOLD = """
import sys
from pathlib import Path
from accum_trainer.train.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
lock.release()
"""


@contextlib.contextmanager
def held(folder, *before):
    """Another process, which `before` may start in another place, holds the lock of `folder`."""
    command = [*before, sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as process:
        if process.stdout.readline() != "locked\n":
            pytest.skip(f"{before[0]} cannot be used here")
        yield process
        process.stdin.close()


@contextlib.contextmanager
def touched(path):
    """A lock that its owner keeps touching."""
    ended = threading.Event()

    def touch():
        while not ended.wait(0.2):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        yield
    finally:
        ended.set()
        toucher.join()


def test_a_lock_of_a_container_with_the_same_host_name_holds(tmp_path, monkeypatch):
    """Its processes have other numbers there."""
    monkeypatch.setattr(run_lock, "BEAT_SEC", 3.0)
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    with (
        held(tmp_path, "unshare", "--pid", "--fork", "--mount-proc"),
        touched(tmp_path / LOCK),
        pytest.raises(ConfigError, match=r"in use: process \d+ on"),
    ):
        RunLock.take(tmp_path)


def test_a_lock_holds_when_the_clock_was_set_anew(tmp_path, monkeypatch):
    """psutil's time of a process's start is the clock's."""
    with held(tmp_path):
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
        with pytest.raises(ConfigError, match="in use"):
            RunLock.take(tmp_path)


def test_a_copied_directory_is_not_in_use_and_the_original_is(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SEC", 1.0)
    monkeypatch.setattr(run_lock, "SILENT_SEC", 3.0)
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    with held(original):
        shutil.copytree(original, copy)
        RunLock.take(copy).release()
        with pytest.raises(ConfigError, match="in use"):
            RunLock.take(original)


def test_a_lock_that_was_touched_in_the_future_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SEC", 1.0)
    monkeypatch.setattr(run_lock, "SILENT_SEC", 3.0)
    path = locked_by(tmp_path, host="another", process=1, started=0.0)
    later = time.time() + 60
    os.utime(path, (later, later))
    began = time.monotonic()
    RunLock.take(tmp_path).release()
    assert time.monotonic() - began < 20


def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    here = socket.gethostname()
    own = os.getpid()
    for owner in (
        {"host": here, "process": 2**22 + 1, "started": 0.0},  # no such process
        {"host": here, "process": own, "started": start_of(own) - 100},  # another one
        {"host": here},
        {"host": here, "process": "x", "started": None},
    ):
        path = locked_by(tmp_path, **owner)
        lock = RunLock.take(tmp_path)
        lock.check()
        assert json.loads(path.read_text())["process"] == os.getpid()
        lock.release()
        assert not path.exists()


def test_a_lock_of_another_host_holds_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SEC", 3.0)
    path = locked_by(tmp_path, host="another", process=1, started=0.0)
    said = "in use: process 1 on another, since 2026"
    with touched(path), pytest.raises(ConfigError, match=said):
        RunLock.take(tmp_path)
    assert json.loads(path.read_text())["host"] == "another"


def test_a_lock_of_another_host_that_gives_no_sign_is_taken_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "BEAT_SEC", 1.0)
    monkeypatch.setattr(run_lock, "SILENT_SEC", 3.0)
    locked_by(tmp_path, host="another", process=1, started=0.0)
    lock = RunLock.take(tmp_path)
    assert "was locked by process 1 on another" in caplog.text
    lock.release()
    old = time.time() - 100
    os.utime(locked_by(tmp_path, host="another", process=1, started=0.0), (old, old))
    caplog.clear()
    RunLock.take(tmp_path).release()
    assert "sign of life" not in caplog.text


def test_whoever_was_taken_for_dead_writes_no_more(tmp_path):
    lock = RunLock.take(tmp_path)
    path = locked_by(tmp_path, host="another", process=1, started=0.0)
    with pytest.raises(AccumTrainerError, match="taken over by process 1 on another"):
        lock.check()
    lock.release()
    assert path.exists()


def test_the_owner_of_a_lock_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SEC", 0.1)
    lock = RunLock.take(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    until = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime == 1:
        assert time.monotonic() < until
        time.sleep(0.05)
    lock.release()


def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path, monkeypatch):
    """Also if each is slow between reading the dead one's lock and removing it."""
    read = run_lock._read  # noqa: SLF001 - the seam that is patched

    def slow(path):
        found = read(path)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(run_lock, "_read", slow)
    locked_by(tmp_path, host=socket.gethostname(), process=2**22 + 1, started=0.0)
    got, refused, start = [], [], threading.Barrier(16)

    def begin():
        start.wait()
        try:
            got.append(RunLock.take(tmp_path))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 15
    got[0].check()
    got[0].release()
    assert [path.name for path in tmp_path.iterdir()] == []
