"""When a run ends early: signals, the time limit, divergence. Knows nothing of the data's end."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from accum_trainer.accumulator import Accumulator
from accum_trainer.errors import DivergedError
from accum_trainer.train.run_folder import DIVERGENCE
from accum_trainer.update import Update


class StoppingPolicy:
    """Asks all processes to stop together after a window, and raises on divergence.

    Args:
        accumulator: carries the request to all processes at the window's end.
        max_hours: the time limit, or None.
        max_skips: windows without an update, of the last twice as many, that mean divergence.
        started: `time.monotonic()` when the run began.

    Attributes:
        reason: why the run stops early ("SIGTERM", "time limit", ...), else "".
    """

    def __init__(
        self, accumulator: Accumulator, max_hours: float | None, max_skips: int, started: float
    ) -> None:
        self.reason = ""
        self._max_skips = max_skips
        self._skipped: deque[bool] = deque(maxlen=2 * max_skips)
        self._accumulator = accumulator
        self._ends = None if max_hours is None else started + max_hours * 3600
        self._longest_window = self._longest_save = 0.0

    def request(self, reason: str) -> None:
        """Ask to stop after the next window; the first reason counts."""
        self.reason = self.reason or reason
        self._accumulator.request_stop()

    def on_signals(self) -> contextlib.AbstractContextManager[None]:
        """A context in which termination signals are requests to stop."""
        return shutdown_on_signal(self.request)

    def check(
        self, update: Update, window_seconds: float, describe_window: Callable[[], str]
    ) -> None:
        """Take note of a finished window.

        Args:
            describe_window: what is known of it, in words; collective.

        Raises:
            DivergedError: training has diverged.
        """
        self._skipped.append(update.skipped)
        if update.skipped and sum(self._skipped) >= self._max_skips:
            self.reason = DIVERGENCE
            raise DivergedError(
                f"{sum(self._skipped)} of the last {len(self._skipped)} windows gave no update "
                f"(--max-skips {self._max_skips}; last reason: {update.reason}) after update "
                f"{update.step}: {describe_window()}; lower lr, set max_grad_norm, or look at the "
                "data"
            )
        self._longest_window = max(self._longest_window, window_seconds)
        if self._ends is not None and time.monotonic() + self._reserve() > self._ends:
            self.request("time limit")

    def note_save(self, seconds: float) -> None:
        """Take note of how long a checkpoint took."""
        self._longest_save = max(self._longest_save, seconds)

    def _reserve(self) -> float:
        """Seconds to keep: the window that carries the request, one more, and the last save."""
        return 3 * self._longest_window + 2 * self._longest_save + 1.0

    def agree_on_reason(self) -> None:
        """Take the main process's reason on every process. Collective."""
        first = self._accumulator.engine.gather_objects(self.reason)[0]
        self.reason = first or "a signal to another process"


@contextlib.contextmanager
def shutdown_on_signal(handle: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into `handle(name)`; a second Ctrl-C interrupts at
    once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    wanted = [s for s in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, s)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in wanted}

    def handler(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        handle(name)
        if name == "SIGINT":
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in wanted:
        signal.signal(getattr(signal, name), handler)
    try:
        yield
    finally:
        for name in wanted:
            signal.signal(getattr(signal, name), before[name])
