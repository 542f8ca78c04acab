"""Paths that files of others name stay inside the folder that the user named.

A run directory may come from anyone. What it names must not take a merge elsewhere: a file outside
would be read into the result, which people publish, or overwritten. Knows no runs.
"""

from __future__ import annotations

import os
from pathlib import Path

from accum_trainer.errors import CheckpointError


def check_is_name(name: object, source: Path) -> str:
    """Return `name` if it is the name of an entry of `source`'s folder, without a path.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set("/\\\0") & set(name):
        raise CheckpointError(
            f"{source} names {name}, which is no name of an entry of its folder; paths are not "
            "followed: put it into the folder, or make the file again"
        )
    return name


def check_inside(path: Path, folder: Path, remedy: str) -> None:
    """Raise a CheckpointError if `path` leads out of `folder` through a link.

    Args:
        remedy: the end of the message.
    """
    found, root = (Path(os.path.realpath(one)) for one in (path, folder))
    if found != root and root not in found.parents:
        raise CheckpointError(f"{path} is a link to {found}, outside {folder}; {remedy}")


def check_tree(tree: Path, folder: Path) -> None:
    """Raise a CheckpointError unless all below `tree` are files and folders of `folder`, or links
    to its files; a folder that is a link could hold itself."""
    remedy = "put a copy in its place"
    check_inside(tree, folder, remedy)
    for parent, folders, names in os.walk(tree):
        for name in [*folders, *names]:
            path = Path(parent, name)
            check_inside(path, folder, remedy)
            if path.is_symlink() and not path.is_file():
                raise CheckpointError(
                    f"{path} is a link to {os.path.realpath(path)}, which is no file; {remedy}"
                )
            if not path.is_file() and not path.is_dir():
                raise CheckpointError(f"{path} is neither a file nor a folder; remove it")
