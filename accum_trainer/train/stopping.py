"""When a run ends early: signals, the time limit, divergence. Knows nothing of the data's end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from accum_trainer.accumulator import Accumulator
from accum_trainer.config import TrainConfig
from accum_trainer.errors import DivergedError
from accum_trainer.train.run_folder import DIVERGENCE
from accum_trainer.update import Update

logger = logging.getLogger(__name__)


class StoppingPolicy:
    """Asks all processes to stop together after a window, and raises on divergence.

    Args:
        accumulator: carries the request to all processes at the window's end.
        config: `max_hours`; `notice_seconds`; `max_skips`, windows without an update, of the last
            twice as many, that mean divergence.
        started: `time.monotonic()` when the run began.

    Attributes:
        reason: why the run stops early ("SIGTERM", "time limit", ...), else "".
    """

    def __init__(self, accumulator: Accumulator, config: TrainConfig, started: float) -> None:
        self.reason = ""
        self._max_skips = config.max_skips
        self._skipped: deque[bool] = deque(maxlen=2 * config.max_skips)
        self._accumulator = accumulator
        self._ends = None if config.max_hours is None else started + config.max_hours * 3600
        self._notice = config.notice_seconds
        self._longest_window = self._longest_save = self._longest_evaluation = 0.0

    def request(self, reason: str) -> None:
        """Ask to stop after the next window; the first reason counts."""
        self.reason = self.reason or reason
        self._accumulator.request_stop()

    def on_signals(self) -> contextlib.AbstractContextManager[None]:
        """A context in which termination signals are requests to stop."""
        return shutdown_on_signal(self.request)

    def check(
        self,
        update: Update,
        window_seconds: float,
        describe_window: Callable[[], str],
        is_evaluation_near: bool = False,
    ) -> None:
        """Take note of a finished window.

        Args:
            is_evaluation_near: an evaluation is due within the next two windows.
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
        if self._accumulator.engine.is_main:
            self._compare_with_notice()
        reserve = self._reserve() + (self._longest_evaluation if is_evaluation_near else 0.0)
        if self._ends is not None and time.monotonic() + reserve > self._ends:
            self.request("time limit")

    def note_save(self, seconds: float) -> None:
        """Take note of how long a checkpoint took."""
        self._longest_save = max(self._longest_save, seconds)

    def note_evaluation(self, seconds: float) -> None:
        """Take note of how long an evaluation took."""
        self._longest_evaluation = max(self._longest_evaluation, seconds)

    def _reserve(self) -> float:
        """Seconds to keep: the window that carries the request, one more, and the last save."""
        return 3 * self._longest_window + 2 * self._longest_save + 1.0

    def _compare_with_notice(self) -> None:
        """Say so once if the notice before the end is too short to save in."""
        # At worst a signal comes early in an evaluation, while a checkpoint is being written: both
        # go on, a window ends, and the run is saved.
        window, save = self._longest_window, self._longest_save
        needed = window + 2 * save + self._longest_evaluation
        if self._notice is None or needed <= self._notice:
            return
        logger.warning(
            "notice_seconds=%g is too short: from the signal to the end of the save, this run may "
            "need %.3g s (a window %.3g s, each of two checkpoints %.3g s, an evaluation %.3g s), "
            "and what it trained since its last checkpoint would be lost; ask for the signal "
            "earlier, as with SLURM's --signal=USR1@%d",
            *(self._notice, needed, window, save, self._longest_evaluation),
            int(1.5 * needed) + 1,
        )
        self._notice = None

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
