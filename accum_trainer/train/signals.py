"""Signals that end a run in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


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
