"""The number of rows of a data file, counted once per content, in a thread: a large file takes
seconds, and the page answers at each key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from accum_trainer.data.counting import count_rows
from accum_trainer.data.embedded import corpus_files
from accum_trainer.data.files import check_file
from accum_trainer.errors import DataError

# A file below this size is counted at once, in milliseconds.
_SMALL_BYTES = 1_000_000
_Key = tuple[str, int, int]


class RowCounts:
    """Numbers of rows by file, as they become known.

    Args:
        counted: called, in the thread that counted, when a number that `of` did not have is there.
    """

    def __init__(self, counted: Callable[[], None]) -> None:
        self._counted = counted
        self._found: dict[_Key, int | DataError] = {}
        self._running: set[_Key] = set()

    def of(self, data_file: str | None) -> int | None:
        """The rows of a file (None: of the embedded corpus); None while they are being counted.

        Raises:
            DataError: the file cannot be read.
        """
        path = check_file(data_file) if data_file is not None else None
        size, changed = (-1, 0)
        if path is not None:
            size, changed = path.stat().st_size, path.stat().st_mtime_ns
        key = (str(path), size, changed)
        if key not in self._found and key not in self._running:
            self._running.add(key)
            if path is not None and size < _SMALL_BYTES:
                self._count(key, path)
            else:
                threading.Thread(target=self._count_then_say, args=(key, path), daemon=True).start()
        found = self._found.get(key)
        if isinstance(found, DataError):
            raise found
        return found

    def _count_then_say(self, key: _Key, path: Path | None) -> None:
        self._count(key, path)
        self._counted()

    def _count(self, key: _Key, path: Path | None) -> None:
        try:
            self._found[key] = count_rows(corpus_files()[0] if path is None else path)
        except DataError as error:
            self._found[key] = error
        finally:
            self._running.discard(key)
