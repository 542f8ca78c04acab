"""Files and folders that are replaced whole: whoever reads, and whoever comes after a process that
was killed at any moment, finds the old one or the new one.

Knows no run and no checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_REPLACED = ".replaced-"


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `path` anew. If that fails, the file that was there before is as it was."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write; at the end of the `with` it takes the place of `path`. After an error
    the file that was there before is as it was."""
    partial = path.with_name(f".{path.name}.partial")
    # In a folder of others, a link would take the content elsewhere.
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename the folder `partial` to `target`, whose content before stays until the new one is
    there."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    finish_replacing(target)
    before = _aside(target)
    if target.exists():  # a folder that is not empty cannot be renamed over
        target.rename(before)
    partial.rename(target)
    sync(target.parent)
    remove(before)


def finish_replacing(target: Path) -> None:
    """After a process was killed inside `put_in_place`: back to the old content, if the new one did
    not get there."""
    before = _aside(target)
    if before.exists() and not target.exists():
        before.rename(target)
    remove(before)


def remove(folder: Path) -> None:
    """Remove a folder, as far as that is possible; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def finish_replacing_in(folder: Path) -> None:
    """`finish_replacing` for all that lies in `folder`."""
    for before in folder.glob(f"{_REPLACED}*"):
        finish_replacing(before.with_name(before.name.removeprefix(_REPLACED)))


def _aside(target: Path) -> Path:
    return target.with_name(_REPLACED + target.name)
