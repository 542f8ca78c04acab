"""Ends a run in which no process gets on any more, and says which one the others wait for.

A process that is frozen, or whose machine is gone, leaves the others in an exchange of gradients
that ends after the library's own limit with an error about sockets, or never. Here a thread of each
process looks at the clock. After too long without a window it asks all processes, through the store
that they met at, where they are; one that does not answer is the one. Knows no training.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from accum_trainer.engine.ranks import Ranks, StoreLostError

# Watches of this process so far. Every process makes the same ones, so their keys agree.
_WATCHES = itertools.count()
# Seconds between two looks, at most, and for the answers of the others beyond that.
_LOOK_SEC = 5.0
_ANSWER_SEC = 5.0
# The backend's own limit comes so many seconds later: its error names no process.
_LIBRARY_SEC = 120.0
_LIBRARIES = ("site-packages", "dist-packages", f"{os.sep}lib{os.sep}python")


class HangWatch:
    """Watches over this process between `start` and `stop`; made on all processes.

    Args:
        ranks: this process among the others; one alone is not watched.
        timeout: seconds without progress until the run is ended.
        end: ends this process with an exit status, from another thread: the main one is inside a
            library and cannot be interrupted.
    """

    def __init__(self, ranks: Ranks, timeout: float, end: Callable[[int], None] = os._exit) -> None:
        self._ranks, self._timeout, self._end_process = ranks, timeout, end
        self._key = f"accum_trainer/hang-{next(_WATCHES)}"
        self._main = threading.get_ident()
        self._window, self._progress_at = 0, time.monotonic()
        self._pauses = 0
        self._has_answered = False
        self._look_sec = min(_LOOK_SEC, timeout / 4)
        self._ended = threading.Event()

    def start(self) -> None:
        if self._ranks.world_size > 1:
            self._ranks.wait_in_training(self._timeout + _LIBRARY_SEC)
            self._progress_at = time.monotonic()
            self._ranks.post(f"{self._key}/host", socket.gethostname())
            threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def progress(self, window: int | None = None) -> None:
        """This process goes on, from now on in `window` if that is given."""
        self._progress_at = time.monotonic()
        if window is not None:
            self._window = window

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is too long: saving, or the caller's own code."""
        self._pauses += 1
        try:
            yield
        finally:
            self.progress()
            self._pauses -= 1

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self._look_sec):
            # Whoever suspends a job and resumes it stops this thread, too, but not the clock.
            stopped = time.monotonic() - looked - self._look_sec
            looked = time.monotonic()
            self._progress_at += stopped if stopped > self._look_sec else 0.0
            is_late = not self._pauses and time.monotonic() - self._progress_at > self._timeout
            try:
                self._look(is_late)
            except StoreLostError as error:
                if is_late:
                    self._end(f"where the others are is not known, because {error}")

    def _look(self, is_late: bool) -> None:
        if is_late:
            self._ranks.post_once(f"{self._key}/asked", str(self._ranks.rank))
        if self._ranks.posted_once(f"{self._key}/asked") is not None:
            self._answer()
        if is_late:
            # The others look at their clocks at other times.
            time.sleep(2 * self._look_sec + _ANSWER_SEC)
            self._end(
                _places(
                    self._ranks.posted_so_far(f"{self._key}/place"),
                    self._ranks.posted_so_far(f"{self._key}/host"),
                )
            )

    def _answer(self) -> None:
        if not self._has_answered:
            self._has_answered = True
            self._ranks.post(f"{self._key}/place", self._place())

    def _place(self) -> str:
        if self._pauses:
            return "between windows (saving, or the caller's own code)"
        frame = sys._current_frames().get(self._main)  # noqa: SLF001 - documented, for debuggers
        return _innermost(frame)

    def _end(self, places: str) -> None:
        if self._ended.is_set():
            return
        print(
            f"error: no process got on for {self._timeout:g} s (--timeout), in window "
            f"{self._window}: {places}. The run ends; the same command continues from the last "
            "checkpoint. If a window, or what the loop's own code does between windows, may take "
            "so long, raise --timeout",
            file=sys.stderr,
            flush=True,
        )
        self._end_process(1)


def _places(places: list[str | None], hosts: list[str | None]) -> str:
    named = [f"process {i} on {host or 'an unknown host'}" for i, host in enumerate(hosts)]
    silent = [name for name, place in zip(named, places, strict=True) if place is None]
    others = [f"{n} is {p}" for n, p in zip(named, places, strict=True) if p is not None]
    said = (
        f"{' and '.join(silent)} did not answer (frozen, or the machine is gone); "
        if silent
        else ""
    )
    return said + ", ".join(others)


def _innermost(frame: FrameType | None) -> str:
    """The line of this package, or of the user's program, that a thread is at."""
    inner = frame
    while frame is not None and any(part in frame.f_code.co_filename for part in _LIBRARIES):
        frame = frame.f_back
    found = frame or inner
    if found is None:
        return "at its end"
    path = Path(found.f_code.co_filename)
    return f"at {path.parent.name}/{path.name}:{found.f_lineno}, in {found.f_code.co_name}"
