"""A real terminal for tests: a command runs in it, and one reads what a person would see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

DEADLINE = 120  # seconds


class Terminal:
    """`Terminal(["ls"], env, folder)`: the command's standard streams are a terminal.

    Args:
        output: a file for standard output, which then is no terminal.

    Attributes:
        screen: what is seen now; `screen.cursor.hidden` says whether the cursor is.
        raw: all bytes that the terminal was sent.
    """

    def __init__(
        self,
        command: list[object],
        env: dict[str, str],
        folder: Path,
        columns: int = 100,
        lines: int = 40,
        output: Path | None = None,
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._side, inside = os.openpty()
        self._set_size(columns, lines)
        with contextlib.ExitStack() as stack:
            out = inside if output is None else stack.enter_context(open(output, "wb")).fileno()
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                env={"TERM": "xterm-256color", **env},
                stdin=inside,
                stdout=out,
                stderr=inside,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        os.close(inside)

    @property
    def text(self) -> str:
        """Everything that a person can scroll to, line by line."""
        top = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*top, *self.screen.display])

    def until(self, happened: Callable[[], object]) -> None:
        """Read until `happened()`."""
        ends = time.monotonic() + DEADLINE
        while not happened():
            assert self._read(), f"the command ended first:\n{self.text}"
            assert time.monotonic() < ends, self.text

    def ended(self) -> int:
        """Read to the end; the command's exit status."""
        ends = time.monotonic() + DEADLINE
        while self._read():
            assert time.monotonic() < ends, self.text
        os.close(self._side)
        return self.process.wait(DEADLINE)

    def type(self, keys: str) -> None:
        os.write(self._side, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> bool:
        """Take what comes within a tenth of a second; False at the end."""
        if not select.select([self._side], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._side, 65536)
        except OSError:  # nobody has the other side any more
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)
