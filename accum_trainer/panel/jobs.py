"""Commands that a page runs for an answer: a merge, a proof. Each is a process of its own and ends
with the panel, unlike a run; all pages see the same one.

Knows no page and no command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from accum_trainer.launch.quoting import words as quoted
from accum_trainer.launch.rank import follow_parent
from accum_trainer.panel.programs import environment, python_for
from accum_trainer.panel.terminal import as_printed

_MOST_BYTES = 64_000


class Job:
    """A command that was started, and what it has said.

    Attributes:
        line: the command as one would type it.
        status: its exit status; None while it runs.
        said: the end of its output, both streams, as a terminal shows it.
        is_stopped: it was asked to stop.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self.line, self.said = quoted(words), ""
        self.status: int | None = None
        self.is_stopped = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed at its end
        self._process = subprocess.Popen(
            python_for(words),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # Ctrl-C on the panel is not meant for it twice
            preexec_fn=follow_parent,
        )

    @property
    def is_running(self) -> bool:
        return self.status is None

    def look(self) -> None:
        """Take in what it has said since, and whether it has ended."""
        if self.status is not None:
            return
        status = self._process.poll()
        size = os.fstat(self._output.fileno()).st_size
        begins = max(0, size - _MOST_BYTES)
        said = os.pread(self._output.fileno(), size - begins, begins)
        self.said = as_printed(said.decode(errors="replace")).strip()
        if status is not None:
            self._output.close()
            self.status = status

    def stop(self) -> None:
        """Ask it to end (SIGTERM)."""
        if self._process.poll() is None:
            self.is_stopped = True
            self._process.send_signal(signal.SIGTERM)


class Jobs:
    """The last job of each subject: one of a subject runs at a time."""

    def __init__(self) -> None:
        self._found: dict[str, Job] = {}

    def of(self, subject: str) -> Job | None:
        """Its last job, up to date."""
        job = self._found.get(subject)
        if job is not None:
            job.look()
        return job

    def start(self, subject: str, words: Sequence[str]) -> Job:
        """Start `words` unless a job of the subject is under way, which is returned then.

        Raises:
            OSError: it cannot be started.
        """
        before = self.of(subject)
        if before is not None and before.is_running:
            return before
        job = self._found[subject] = Job(words)
        return job

    def forget(self, subject: str) -> None:
        """Drop a job that has ended, so that it is shown no more."""
        job = self._found.get(subject)
        if job is not None and not job.is_running:
            del self._found[subject]
