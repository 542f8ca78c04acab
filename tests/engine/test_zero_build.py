"""The lock of DeepSpeed's build: waited for while a process holds it, refused if one left it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time

import pytest

from accum_trainer.engine import zero_build
from accum_trainer.errors import EngineError


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "lock").touch()
    return tmp_path / "lock"


def age(lock, seconds):
    then = time.time() - seconds
    os.utime(lock, (then, then))


def test_an_old_lock_that_no_process_holds_is_refused_by_name(lock):
    age(lock, 12 * 60)
    with pytest.raises(EngineError) as refused:
        zero_build.await_lock(lock)
    assert f"{lock} is 12 minutes old and no process here holds it" in str(refused.value)
    assert f"remove it (rm {lock})" in str(refused.value)


def test_a_young_lock_is_waited_for_and_named(lock, caplog):
    """It may belong to a machine that shares the folder."""
    threading.Timer(0.3, lock.unlink).start()
    with caplog.at_level(logging.WARNING):
        zero_build.await_lock(lock)
    (record,) = caplog.records
    assert f"waiting for {lock}, which no process here holds" in record.getMessage()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lock_that_a_process_holds_is_waited_for_however_old(lock, caplog):
    age(lock, 3600)
    with open(lock), caplog.at_level(logging.WARNING):
        threading.Timer(0.3, lock.unlink).start()
        zero_build.await_lock(lock)
    (record,) = caplog.records
    assert f"process {os.getpid()} compiles DeepSpeed's extension" in record.getMessage()


@pytest.mark.parametrize("has_own", [True, False])
def test_the_ninja_of_this_python_builds(tmp_path, monkeypatch, has_own):
    """Wherever another one is on PATH: each version builds anew what another has built."""
    for name, has_ninja in (("own", has_own), ("other", True)):
        (tmp_path / name).mkdir()
        if has_ninja:
            (tmp_path / name / "ninja").write_text("#!/bin/sh\n")
            (tmp_path / name / "ninja").chmod(0o755)
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    first = shutil.which("ninja", path=own) or shutil.which("ninja", path=other)
    for path in ([other], [other, own], [own, other]):
        monkeypatch.setenv("PATH", os.pathsep.join(path))
        zero_build.prefer_own_ninja(own)
        assert shutil.which("ninja") == first
        assert other in os.environ["PATH"].split(os.pathsep)
        assert (os.environ["PATH"] == os.pathsep.join(path)) or has_own


@pytest.mark.parametrize("rank, built, says", [(0, False, 1), (1, False, 0), (0, True, 0)])
def test_a_build_is_announced_once_on_a_machine(tmp_path, monkeypatch, caplog, rank, built, says):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(zero_build, "_extension_to_compile", lambda: "ours")
    (tmp_path / "ours").mkdir()
    if built:
        (tmp_path / "ours" / "ours.so").touch()
    with caplog.at_level(logging.WARNING):
        zero_build.await_extension()
    assert len(caplog.records) == says
    assert all(str(tmp_path / "ours") in record.getMessage() for record in caplog.records)
