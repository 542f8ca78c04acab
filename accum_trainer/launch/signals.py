"""Stop signals of a program that starts trainings: collect them, to pass them on.

The trainings save and end with STOPPED_AND_SAVED. Knows no processes.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

STOPPED_AND_SAVED = 75  # exit status of a training that a signal stopped
POLL_INTERVAL_SEC = 0.1
# Send the stop again after this time: a process that was still importing ignored the first.
RESEND_AFTER_SEC = 2.0


@contextlib.contextmanager
def collect_stop_signals() -> Iterator[list[int]]:
    """Collect the signals that ask for a stop; a second Ctrl-C raises KeyboardInterrupt."""
    signals: list[int] = []

    def handler(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {
        number: signal.signal(number, handler)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield signals
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
