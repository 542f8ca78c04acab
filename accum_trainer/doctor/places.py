"""Places: the run directory's file system, the caches, ports. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from accum_trainer.data.files import cache_dir
from accum_trainer.doctor.report import FAIL, LIMIT, Finding
from accum_trainer.errors import ConfigError
from accum_trainer.train.run_folder import check_writable

# File systems that several machines see.
_SHARED = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "glusterfs", "wekafs"),
    *("afs", "ocfs2", "gfs2", "pvfs2", "orangefs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs"),
}
_IN_MEMORY = {"tmpfs", "ramfs"}
_TRIED_BYTES = 4 << 20
# Less does not hold the checkpoints of a small model.
_LEAST_DISK = 2e9
_SKEW_SEC = 2.0
DEFAULT_PORT = 29500  # of torchrun and accelerate


def run_directory(path: Path) -> Iterator[Finding]:
    """Whether runs can live in `path`: written, synced, renamed and locked there; what file system
    it is on, and its clock."""
    try:
        check_writable("output_dir", path)
    except ConfigError as error:
        yield Finding("run directory", str(error), FAIL, "give another --output-dir", data={})
        return
    folder = next(parent for parent in [path, *path.absolute().parents] if parent.is_dir())
    kind, mount = file_system(folder)
    usage = shutil.disk_usage(folder)
    data = {"path": str(path), "file_system": kind, "mount": mount, "free_gb": usage.free / 1e9}
    where = f"{path}: {kind} of {mount}, {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    begun = time.perf_counter()
    try:
        skew = _try_files(folder)
    except OSError as error:
        yield Finding(
            "run directory",
            f"{where}, and a file of {_TRIED_BYTES >> 20} MB cannot be written: {error.strerror}",
            FAIL,
            "make room there (accum-trainer keeps --keep-checkpoints 2), or give another "
            "--output-dir",
            data=data,
        )
        return
    speed = _TRIED_BYTES / 1e6 / (time.perf_counter() - begun)
    yield _of_directory(where, kind, usage.free, speed, data | {"mb_per_sec": speed})
    if abs(skew) > _SKEW_SEC:
        yield Finding(
            "file server's clock",
            f"{skew:+.1f} s from this machine's",
            LIMIT,
            "synchronise both (timedatectl set-ntp true)",
            ("taking over the lock of a killed run on time",),
            {"seconds": skew},
        )


def _of_directory(
    where: str, kind: str, free: float, speed: float, data: dict[str, object]
) -> Finding:
    says = f"{where}; {speed:,.0f} MB/s written and synced"
    is_shared = kind in _SHARED
    says += "; other machines see it" if is_shared else "; only this machine sees it"
    nodes = os.environ.get("SLURM_NNODES", "1")
    if not is_shared and nodes.isdecimal() and int(nodes) > 1:
        return Finding(
            "run directory",
            f"{says}, and the job has {nodes} nodes",
            LIMIT,
            "give an --output-dir on a file system that all nodes see",
            ("several nodes",),
            data,
        )
    if free < _LEAST_DISK:
        return Finding(
            "run directory",
            f"{says}: little room for checkpoints",
            LIMIT,
            "make room, or give another --output-dir",
            ("checkpoints",),
            data,
        )
    if kind in _IN_MEMORY:
        return Finding(
            "run directory",
            f"{says}; it is in memory, and gone after a restart",
            LIMIT,
            "give an --output-dir on a disk",
            ("runs that outlive a restart",),
            data,
        )
    return Finding("run directory", says, data=data)


def _try_files(folder: Path) -> float:
    """Write, sync, rename, link and lock a file in `folder` as a run does, and remove it; return
    how far its file system's clock is ahead, in seconds."""
    name = f".accum-trainer-doctor-{uuid.uuid4().hex}"
    first, second, third = (folder / f"{name}-{number}" for number in range(3))
    try:
        with open(first, "wb") as file:
            file.write(os.urandom(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
            written, now = os.fstat(file.fileno()).st_mtime, time.time()
            with contextlib.suppress(OSError):  # the lock does without, if there is none
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.replace(second)
        with contextlib.suppress(OSError):  # as above
            os.link(second, third)
        return written - now
    finally:
        for file_left in (first, second, third):
            file_left.unlink(missing_ok=True)


def file_system(path: Path) -> tuple[str, str]:
    """(type, mount point) of the file system that holds `path`; ("unknown", "/") if the system does
    not say."""
    real, best = path.resolve(), ("unknown", "/")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            point = mount.encode().decode("unicode_escape")
            # The last line of equal ones is what was mounted over the others.
            if real.is_relative_to(point) and len(point) >= len(best[1]):
                best = kind, point
    return best


def caches() -> Iterator[Finding]:
    """The folders that tokenised rows and downloads are kept in."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    for name, folder, variable in (
        ("cache", cache_dir(), "ACCUM_TRAINER_CACHE"),
        ("hub cache", hub, "HF_HOME"),
    ):
        try:
            check_writable(variable, folder)
        except ConfigError as error:
            yield Finding(
                name,
                str(error),
                FAIL if variable == "ACCUM_TRAINER_CACHE" else LIMIT,
                f"export {variable}=DIR, with a folder that you may write",
                ("downloads",),
            )
        else:
            yield Finding(name, f"{folder}{offline if variable == 'HF_HOME' else ''}")


def ports(asked: int | None) -> Iterator[Finding]:
    """Whether the port where processes meet is free: `asked`, else the launchers' default."""
    port = asked or int(_decimal(os.environ.get("MASTER_PORT")) or DEFAULT_PORT)
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
            tried.listen()
    except (OSError, OverflowError) as error:
        with socket.socket() as other:
            other.bind(("", 0))
            free = other.getsockname()[1]
        yield Finding(
            "port",
            f"{port} cannot be used: {getattr(error, 'strerror', None) or error}{_holder(port)}",
            FAIL if asked is not None else LIMIT,
            f"give --main_process_port {free} (accelerate) or --master_port {free} (torchrun); "
            "accum-trainer launch finds a free one",
            ("the launchers' default port",),
            {"port": port, "free": free},
        )
        return
    yield Finding("port", f"{port} is free", data={"port": port})


def _decimal(text: str | None) -> str:
    return text if text and text.isdecimal() and len(text) < 6 else ""


def _holder(port: int) -> str:
    """Who listens there, as far as the system shows this user."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            is_there = connection.laddr and connection.laddr.port == port
            if is_there and connection.status == psutil.CONN_LISTEN and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f" (process {connection.pid}, {name}, listens there)"
    return ""
