"""Make a folder for logs, and remove it again if the start was refused; open a log."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from accum_trainer.errors import ConfigError


def private(path: str, flags: int) -> int:
    """An opener of files that nobody else may read: messages in a log quote rows."""
    return os.open(path, flags, 0o600)


def make_folder(path: Path, option: str = "output_dir") -> list[Path]:
    """Make the folder and its parents; returns those it made, innermost first.

    Raises:
        ConfigError: it cannot be made; `option` is what names it.
    """
    missing = [folder for folder in [path, *path.absolute().parents] if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {path} cannot be made: {error.strerror}; name another {option}"
        ) from None
    return missing


def remove_folders(made: list[Path]) -> None:
    """Undo `make_folder`, except for folders that are no longer empty."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
