"""One of several independent runs: its settings, its process, and the files in its run directory.

Knows how to start `train` in a process and read what it wrote; nothing of devices and other runs.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accum_trainer.config import TrainConfig
from accum_trainer.launch.folders import private
from accum_trainer.launch.process import import_places
from accum_trainer.launch.rank import follow_parent
from accum_trainer.runs.independent_files import label_of
from accum_trainer.train import run_folder as files
from accum_trainer.train.records import Record

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass
class IndependentRun:
    """A run and its current state.

    Attributes:
        settings: the options that differ from the other runs, as text.
        state: `waiting` (for a device), `running`, `done`, `stopped` (saved, to be continued) or
            `failed`.
        device: the device of its last start.
        restarts: how often it was restarted after a crash.
        reason: why it failed: its own error message, or the signal that killed it.
        status: the exit status of its last process.
    """

    name: str
    settings: dict[str, str]
    config: TrainConfig
    folder: Path
    log: Path
    state: str = WAITING
    device: str | None = None
    restarts: int = 0
    reason: str = ""
    status: int | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log_begins: int = 0
    _records: tuple[int, Record] | None = None

    @property
    def label(self) -> str:
        """Its settings in a few words: `shard 0/4`, `lr=1e-4`."""
        return label_of(self.settings)

    def start(self, device: str, environment: Mapping[str, str]) -> None:
        self.device, self.state = device, RUNNING
        file = self.log.with_suffix(".yaml")
        file.write_text(self.config.to_yaml())
        # The file cannot allow it; this run's own command line did.
        trust = ["--trust-remote-code"] if self.config.trust_remote_code else []
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab", opener=private) as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accum_trainer.train", "--config", str(file), *trust],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment) | import_places(),
                start_new_session=True,
                preexec_fn=follow_parent,
            )

    def has_exited(self) -> bool:
        """Whether its process has ended since the last start; then `status` is set."""
        if self.process is None or self.process.poll() is None:
            return False
        self.status, self.process = self.process.returncode, None
        return True

    def send(self, number: int) -> None:
        """Send a signal to its process, if one is running."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def last_record(self) -> Record | None:
        """The newest whole record of its metrics.jsonl."""
        path = self.folder / files.METRICS
        try:
            size = path.stat().st_size
        except OSError:
            return None
        if self._records is None or self._records[0] != size:
            with open(path, "rb") as file:
                file.seek(max(0, size - 8192))
                lines = file.read().split(b"\n")[:-1]
            if not lines:
                return None
            # The last 8 KiB may begin inside a record; if that is the only line, try again later.
            with contextlib.suppress(ValueError):
                self._records = size, json.loads(lines[-1])
        return self._records[1] if self._records is not None else None

    def total_updates(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / files.PLAN).read_text())["total_updates"]
        return None

    def result(self) -> dict[str, Any] | None:
        """Its result.json; None if it has not ended."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / files.RESULT).read_text())
        return None

    def is_done(self) -> bool:
        result = self.result()
        return result is not None and result["done"]

    def is_extended(self) -> bool:
        """Whether it is now asked to train for another length than in its run directory."""
        before = TrainConfig.from_yaml(self.folder / files.CONFIG, trust_remote_code=False)
        return (before.steps, before.epochs) != (self.config.steps, self.config.epochs)

    def failure(self) -> str:
        """Why its last process failed: the signal, its error message, or the last line it
        printed."""
        assert self.status is not None
        if self.status < 0:
            name = signal.Signals(-self.status).name
            why = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            return f"killed by {name}{why}"
        return self._last_words() or f"ended with status {self.status}"

    def _last_words(self) -> str:
        if not self.log.exists():
            return ""
        with open(self.log, errors="replace") as file:
            file.seek(self._log_begins)
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error")]
        # Its configuration is ours: named in an error, it would make the same one differ by run.
        own = f"error: {self.log.with_suffix('.yaml')}: "
        return (errors or lines or [""])[-1].replace(own, "error: ")
