"""A command that is under way: watch its run, signal its processes, and see how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accum_trainer.train.records import read_records
from tests.launching import ROOT, STAND_INS, environment, with_stand_ins

DEADLINE = 240  # seconds until a test gives up on something that must happen


class Started:
    """`Started(["accum-trainer's arguments"], folder)`: output goes to files in `folder`.

    It and all that it starts are forked from one process (tests/forkserver.py), unless they must be
    `fresh`, as where a test looks at who started whom.
    """

    def __init__(
        self,
        command: list[object],
        folder: Path,
        cwd: Path = ROOT,
        fresh: bool = False,
        **more: object,
    ) -> None:
        env = environment(OMP_NUM_THREADS=1, **more)
        if not fresh:
            env = with_stand_ins(env)
            command = [STAND_INS / "python" if c == sys.executable else c for c in command]
        self._out, self._err = folder / "out", folder / "err"
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def out(self) -> str:
        return self._out.read_text()

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until `happened()`; fails where the command ends first."""
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert self.process.poll() is None, self.out[-2000:] + self.err[-4000:]
            assert time.monotonic() < deadline, self.err[-4000:]
            time.sleep(0.02)

    def until_update(self, run: Path, update: int) -> None:
        self.until(lambda: len(read_records(run / "metrics.jsonl")) >= update)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ended(self) -> int:
        try:
            return self.process.wait(DEADLINE)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def accum_trainer(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "accum_trainer", *arguments]


def process_of(*arguments: str) -> int:
    """The pid of the process whose command line has all of `arguments`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if set(arguments) <= set(words):
                return int(entry.name)
    raise LookupError(f"no process has {arguments}")


def wait_for_end(pid: int) -> None:
    """Wait until a process that is no child of this one is gone."""
    deadline = time.monotonic() + DEADLINE
    while (
        status := Path(f"/proc/{pid}/status")
    ).exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.05)
