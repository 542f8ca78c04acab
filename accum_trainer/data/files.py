"""Rows from files and hub data sets, through `datasets`; errors name the file and the line.

Knows file formats, but not which columns can be trained on (`rows` does).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accum_trainer.data.checking import check_json, check_text, good_lines
from accum_trainer.data.literal import check_csv, csv_options, is_written_otherwise, read_json
from accum_trainer.data.rows import TEXT_COLUMNS
from accum_trainer.data.skipped import Skipped
from accum_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets

# A file system may give two writes within this time the same time stamp.
_TICK_SEC = 2.0
# Suffix -> builder of `datasets`.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def cache_dir() -> Path:
    """The folder of reproducible files: $ACCUM_TRAINER_CACHE, else in the user's cache folder."""
    if "ACCUM_TRAINER_CACHE" in os.environ:
        return Path(os.environ["ACCUM_TRAINER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accum_trainer"


def private_cache(name: str) -> Path:
    """A folder in the cache, which nobody else reads or writes: its files hold the user's rows.

    A folder that $ACCUM_TRAINER_CACHE names may be shared on purpose; what is made in it has its
    permissions.
    """
    root = cache_dir()
    is_shared = "ACCUM_TRAINER_CACHE" in os.environ and root.is_dir()
    mode = stat.S_IMODE(root.stat().st_mode) if is_shared else 0o700
    folder = root / name
    for path in [folder] if is_shared else [root, folder]:
        if is_shared and path.is_dir():
            continue
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another user's
            path.chmod(mode)
    return folder


def check_file(path: str | Path) -> Path:
    """Return `path` if it is a file with a known suffix that is not empty.

    Raises:
        DataError: it is not.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"data file {path} does not exist")
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no ordinary file"
        raise DataError(f"data file {path} {kind}; name one file, {_suffixes()}")
    if path.suffix not in BUILDERS:
        raise DataError(
            f"data file {path} ends in {path.suffix or 'nothing'!r}; give {_suffixes()}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    return path


def _suffixes() -> str:
    *most, last = BUILDERS
    return f"{', '.join(most)} or {last}"


def digest(path: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal; equal for equal data files."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def unchanged(path: str | Path) -> Iterator[str]:
    """A context in which a data file is read; gives its `digest`.

    Raises:
        DataError: at the end, if the content is another by then: what was read may be of both.
    """
    path = check_file(path)
    stamp, content = _stamp(path), digest(path)
    try:
        yield content
    except (DataError, OSError) as error:  # such as a line that is half written
        if _is_still(path, stamp, content):
            raise
        raise _changed(path) from error
    if not _is_still(path, stamp, content):
        shutil.rmtree(_rows_folder(content), ignore_errors=True)  # its rows may be others
        raise _changed(path)


def _stamp(path: Path) -> tuple[int, ...]:
    """Of a file's content: equal stamps that are older than `_TICK_SEC` mean equal content."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_still(path: Path, stamp: tuple[int, ...], content: str) -> bool:
    try:
        is_old = time.time() - stamp[-1] / 1e9 > _TICK_SEC
        # Renaming it, or changing its mode, changes the stamp alone.
        return (is_old and _stamp(path) == stamp) or digest(path) == content
    except OSError:
        return False


def _changed(path: Path) -> DataError:
    return DataError(
        f"data file {path} changed while it was read, so its rows may be of two states; wait until "
        "it is written, or give a copy that nobody changes"
    )


def _rows_folder(content: str) -> Path:
    """Where the rows of a file with this digest are kept."""
    return private_cache("rows") / content[:32]


def without_bad_lines(path: str | Path, skipped: Skipped) -> Path:
    """A data file without the lines that `read_file` would refuse: `path` itself if there are none,
    else a copy in the cache.

    Only .jsonl and .txt have lines that can be left out: a fault in another format may change what
    the rest means.

    Args:
        skipped: counts them.

    Raises:
        DataError: no line can be read.
    """
    path = check_file(path)
    if path.suffix not in (".jsonl", ".txt"):
        return path
    before, partial = skipped.count, private_cache("good") / f"{uuid.uuid4().hex}{path.suffix}"
    try:
        sha = hashlib.sha256()
        with open(partial, "wb") as file:
            for line in good_lines(path, skipped):
                file.write(line + b"\n")
                sha.update(line + b"\n")
        if skipped.count == before:
            return path
        if partial.stat().st_size == 0:
            raise DataError(f"data file {path} has no line that can be read: {skipped.first}")
        return partial.replace(partial.with_name(sha.hexdigest()[:32] + path.suffix))
    finally:
        partial.unlink(missing_ok=True)


def read_file(
    path: str | Path, columns: Sequence[str] = (), content: str | None = None
) -> datasets.Dataset:
    """Read the rows of a data file; in a text file, each line that is not blank is a row.

    Args:
        path: a file with a suffix of `BUILDERS`.
        columns: further columns whose numbers are text as the file writes them, like those in
            `TEXT_COLUMNS`.
        content: the file's `digest`, if it is known; `datasets` recognises a file that it has read
            before by its size and time only, and a replaced file can have both.

    Raises:
        DataError: `check_file` refuses the file, its content is not of its format (with the line),
            or it has no rows.
    """
    path = check_file(path)
    if path.suffix != ".parquet":
        check_text(path)
    import datasets

    folder = _rows_folder(content or digest(path))
    is_json = path.suffix in (".json", ".jsonl")
    options: dict[str, Any] = {}
    if is_json and not folder.exists():  # else it was checked when it was read
        check_json(path)
    elif path.suffix == ".csv":
        check_csv(path)
        options = csv_options(path)
    elif path.suffix == ".txt":
        options = {"encoding": "utf-8-sig"}  # a byte order mark is no text
    try:
        rows = datasets.load_dataset(
            BUILDERS[path.suffix],
            data_files=str(path),
            split="train",
            cache_dir=str(folder),
            **options,
        )
    except Exception as error:  # datasets wraps errors of pyarrow, json and csv, without the line
        if not is_json:
            raise DataError(_unreadable(path, error)) from None
        check_json(path)
        rows = read_json(path)  # valid JSON, such as a column of both numbers and text
    else:
        if is_json and is_written_otherwise(rows.features, {*TEXT_COLUMNS, *columns}):
            rows = read_json(path)
    if path.suffix == ".txt":
        rows = rows.filter(lambda row: bool(row["text"].strip()))
    if len(rows) == 0:
        raise DataError(f"data file {path} has no rows")
    return rows


def _unreadable(path: Path, error: Exception) -> str:
    """The error that `datasets` raised about a file; it names no line."""
    cause = error.__cause__ or error
    return (
        f"data file {path} cannot be read as {path.suffix[1:]}: "
        f"{str(cause).splitlines()[0] if str(cause) else cause!r}"
    )


def read_hub(name: str) -> datasets.Dataset:
    """Read the training split of a hub data set, `id` or `id:config`.

    Raises:
        DataError: it cannot be reached or found, or has no training split.
    """
    import datasets

    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split="train")
    except Exception as error:  # offline, unknown, gated, no such config: many types, one remedy
        first = str(error).splitlines()[0].rstrip(" .") if str(error) else repr(error)
        raise DataError(
            f"dataset {name} cannot be loaded from the hub: {first}; for a file on this machine "
            "use dataset_file"
        ) from None
