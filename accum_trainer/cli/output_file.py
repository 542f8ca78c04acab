"""Files that a command is asked to write: checked before its work, replaced only if they are its
own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from accum_trainer.errors import ConfigError


def check_output_file(option: str, path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise a ConfigError if `path`, which `option` names, cannot be written, or is one of the
    files that the command reads."""
    reason = None
    if path.is_dir():
        reason = "it is a folder; name a file"
    elif not path.absolute().parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        reason = "no permission"
    elif path.exists() and any(Path(one).exists() and path.samefile(one) for one in inputs):
        reason = "it is one of the runs; name another file"
    if reason is not None:
        raise ConfigError(f"{option}={path} cannot be written: {reason}")


def check_replaceable(option: str, path: Path, beginning: bytes, kind: str) -> None:
    """Raise a ConfigError if a file is there that does not begin as one of this kind does: it is
    somebody's other file."""
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for
        raise ConfigError(f"{option}={path} is no file; name a file")
    try:
        with open(path, "rb") as file:
            begins = file.read(len(beginning))
    except OSError as error:
        raise ConfigError(f"{option}={path} cannot be read: {error.strerror}") from None
    if begins not in (beginning, b""):
        raise ConfigError(f"{option}={path} exists and is no {kind}; name another file")
