"""One process at a time trains in a run directory: run.lock names it.

The lock is a file that its owner touches every few seconds. On the owner's host, and in its
container, the process that it names tells whether it is alive; elsewhere the touches do, by the
clock of the file server. They also tell a lock that was copied with its directory, whose owner
trains in the original. A lock whose owner is gone is taken over, so a run that was killed continues
without anybody's help. The operating system's locks are not used for the run itself:
some shared file systems do not have them, and they pass to the loader's worker processes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.process import start_of

logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_SEC = 10.0
# Without a touch for so long, an owner on another host or container is taken for dead.
SILENT_SEC = 60.0


class RunLock:
    """The lock of one run directory, held by this process. Made by `take`."""

    def __init__(self, path: Path, owner: dict[str, Any]) -> None:
        self._path, self._owner = path, owner
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        atexit.register(self.release)

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """Lock `folder`, which exists.

        Raises:
            ConfigError: another process, which is alive, has locked it.
        """
        path, owner = folder / LOCK, _this_process()
        gone: dict[str, Any] | None = None  # an owner that is known to be dead
        while True:
            with one_at_a_time(folder):
                if _create(path, owner):
                    return cls(path, owner)
                found = _read(path)
                if found is not None and found == gone:
                    path.unlink(missing_ok=True)
                    logger.info("the lock of %s was left by %s that is gone", folder, _named(found))
                    continue
            if found is not None:  # else it was released meanwhile
                _wait_for_its_end(path, found)
                gone = found

    def check(self) -> None:
        """Raise an AccumTrainerError if another process has taken the lock, because this one gave
        no sign of life."""
        found = _read(self._path)
        if found is not None and found != self._owner:
            raise AccumTrainerError(
                f"{self._path.parent} was taken over by {_named(found)}, because this process gave "
                f"no sign of life for {SILENT_SEC:.0f} s; it ends here, and nothing more is written"
            )

    def release(self) -> None:
        """Unlock, if this process still holds the lock."""
        self._ended.set()
        atexit.unregister(self.release)
        if os.getpid() == self._owner["process"] and _read(self._path) == self._owner:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SEC):
            with contextlib.suppress(OSError):
                os.utime(self._path)


@dataclass(frozen=True)
class Owner:
    """The process that trains in a run directory.

    Attributes:
        since: when it began, as text.
        started: `start_of` the process, on its machine.
        is_here: it is a process of this machine, which can be signalled.
    """

    process: int
    host: str
    since: str
    started: int | None
    is_here: bool


def owner_of(folder: Path) -> Owner | None:
    """Who trains in `folder` now; None if nobody does. Only looks, and does not wait: an owner on
    another host counts as alive for `SILENT_SEC` after its last touch, by this host's clock."""
    path = folder / LOCK
    found = _read(path)
    if not found or not _is_its_own(path, found):
        return None
    is_here = found.get("host") == socket.gethostname() and found.get("machine") == this_machine()
    if is_here and not _runs_here(found):
        return None
    if not is_here and time.time() - _touched(path) > SILENT_SEC:
        return None
    try:
        return Owner(
            int(found["process"]),
            *(str(found["host"]), str(found["since"]), found["started"], is_here),
        )
    except (KeyError, TypeError, ValueError):  # damaged
        return None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": this_machine(),
        "process": os.getpid(),
        "started": start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "id": uuid.uuid4().hex,  # of this lock
    }


def this_machine() -> str | None:
    """Names the processes that this one can see: containers may share a host name, and one number
    is another process in each. None where the system has no such name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Create the lock, whole, unless there is one."""
    partial = path.with_name(f".{LOCK}-{owner['id']}")
    try:
        _write(partial, owner)
        return _link(partial, path, owner)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, path: Path, owner: dict[str, Any]) -> bool:
    """Give the file `source` the name `path`, too, unless it is taken."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            _write(path, owner)
        except FileExistsError:
            return False
    return True


def _write(path: Path, owner: dict[str, Any]) -> None:
    """Write `owner`, with the number of its file, into a new file: a copy has another number."""
    with open(path, "x", encoding="utf-8") as file:
        owner["file"] = os.fstat(file.fileno()).st_ino
        file.write(json.dumps(owner) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None if there is no lock. Of a damaged lock nothing is known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait_for_its_end(path: Path, owner: dict[str, Any]) -> None:
    """Return once the owner of a lock is gone.

    Raises:
        ConfigError: it is alive.
    """
    here = owner.get("host") == socket.gethostname() and owner.get("machine") == this_machine()
    if here and not _runs_here(owner):
        return
    first, began = _touched(path), time.monotonic()
    if here and _is_its_own(path, owner):
        raise _in_use(path, owner)
    # The last touch may be in the future, of a clock that was set back or of a copied file.
    while (silent := max(_now(path.parent) - first, time.monotonic() - began)) < SILENT_SEC:
        logger.warning(
            "%s was locked by %s; waiting up to %.0f s for a sign of life",
            *(path.parent, _named(owner), SILENT_SEC - silent),
        )
        for _ in range(round(BEAT_SEC)):
            time.sleep(1.0)
            if _read(path) != owner:
                return  # released, or another one's by now
            if _touched(path) != first:
                raise _in_use(path, owner)


def _runs_here(owner: dict[str, Any]) -> bool:
    """Whether the owner, a process of this host, is alive: not another one with its number."""
    try:
        is_dead = psutil.Process(owner["process"]).status() == psutil.STATUS_ZOMBIE
        return not is_dead and start_of(owner["process"]) == owner["started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _is_its_own(path: Path, owner: dict[str, Any]) -> bool:
    """Whether the file at `path` is the one that the owner wrote, not a copy of it."""
    with contextlib.suppress(FileNotFoundError):
        return owner.get("file") in (None, path.stat().st_ino)
    return False


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep others from taking a lock over at the same moment: two that remove a dead owner's lock
    could remove each other's. The system frees this at once if the process dies; where a file
    system cannot do it, the moment is a few milliseconds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _touched(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _now(folder: Path) -> float:
    """The time by the clock that `folder`'s files are stamped with."""
    probe = folder / f".{LOCK}-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _in_use(path: Path, owner: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"output_dir={path.parent} is in use: {_named(owner)} trains in it; wait for it, stop it, "
        "or choose another output_dir"
    )


def _named(owner: dict[str, Any]) -> str:
    return (
        f"process {owner.get('process', 'unknown')} on {owner.get('host', 'an unknown host')}, "
        f"since {owner.get('since', 'an unknown time')},"
    )
