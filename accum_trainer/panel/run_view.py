"""The state of a run, read from its directory alone: so it is the same for a run that was started
here, in a terminal, or on another machine that shares the folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accum_trainer.launch.last_words import last_words
from accum_trainer.panel.curves import RecordReader, number
from accum_trainer.panel.processes import LOG, Start, changed, read_start
from accum_trainer.panel.terminal import as_printed
from accum_trainer.plan.advice import advice_of_run, why_unknown
from accum_trainer.runs.independent_files import INDEPENDENT
from accum_trainer.train.run_folder import DIVERGENCE, LOGS, METRICS, PLAN, RESULT, holds_run
from accum_trainer.train.run_lock import Owner, owner_of

STARTING, TRAINING, STOPPING, STOPPED, DONE, FAILED, ENDED = (
    "starting",
    "training",
    "stopping",
    "stopped",
    "done",
    "failed",
    "ended",
)
ACTIVE = (STARTING, TRAINING, STOPPING)
# The states in words.
SAID = {
    STARTING: "starting",
    TRAINING: "training",
    STOPPING: "saving and stopping",
    STOPPED: "stopped and saved",
    DONE: "done",
    FAILED: "failed",
    ENDED: "ended without saving",
}
_MOST_RUNS = 300
_TAIL_BYTES = 64_000
_OF_NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")


def find_runs(root: Path) -> list[str]:
    """Names (paths below `root`) of the runs in a folder, and of those in its folders, the one that
    changed last first."""
    found = sorted(
        (max(changed(folder / name) for name in (METRICS, PLAN, f"{LOGS}/{LOG}")), folder)
        for folder in _runs_in(root)
    )
    return [str(folder.relative_to(root)) for _, folder in reversed(found[-_MOST_RUNS:])]


def find_groups(root: Path) -> list[str]:
    """Names of the folders of independent runs in a folder, and in its folders."""
    return sorted(str(folder.relative_to(root)) for folder in _groups_in(root))


def _runs_in(root: Path, depth: int = 2) -> Iterator[Path]:
    for folder in _folders_in(root):
        if is_group(folder):
            yield from (one for one in _folders_in(folder) if holds_run(one))
        elif holds_run(folder) or (folder / LOGS / LOG).is_file():
            yield folder
        elif depth > 1 and not folder.name.startswith("."):
            yield from _runs_in(folder, depth - 1)


def _groups_in(root: Path, depth: int = 2) -> Iterator[Path]:
    for folder in _folders_in(root):
        if is_group(folder):
            yield folder
        elif depth > 1 and not folder.name.startswith(".") and not holds_run(folder):
            yield from _groups_in(folder, depth - 1)


def is_group(folder: Path) -> bool:
    """Whether these are independent runs, side by side."""
    return (folder / INDEPENDENT).is_file()


def _folders_in(root: Path) -> list[Path]:
    try:
        entries = [entry for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [Path(entry.path) for entry in entries]


class RunView:
    """One run.

    Attributes:
        records: its records so far.
        plan, result: plan.json and result.json, empty if there is none.
        owner: who trains it now.
        start: its last start by a panel.
        log: the end of its log.
        state: one of the words of this module.
        message: how it ended, or why; "" while it runs.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.records = RecordReader(folder / METRICS)
        self.plan: dict[str, Any] = {}
        self.result: dict[str, Any] = {}
        self.owner: Owner | None = None
        self.start: Start | None = None
        self.log = self.message = ""
        self.state = ENDED
        self._read_at = 0.0

    def refresh(self, at_most_every_sec: float = 0.4, whole: bool = True) -> None:
        """Read what is new; pages that ask for one run share the answer.

        Args:
            whole: all records; else the last one only, unless the others are known already.
        """
        is_read = len(self.records) > 0 or not whole
        if is_read and time.monotonic() - self._read_at < at_most_every_sec:
            return
        self._read_at = time.monotonic()
        self.owner, self.start = owner_of(self.folder), read_start(self.folder)
        # After the lock: an ending that is written between the two is then not taken for none.
        self.plan, self.result = json_of(self.folder / PLAN), json_of(self.folder / RESULT)
        if whole or len(self.records):
            self.records.read()
        else:
            self.records.read_last()
        self.log = self._tail()
        self.state = self._state()
        self.message = self._message()

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def updates(self) -> int:
        """Updates made."""
        done = number(self.records.last.get("step"))
        return int(done or 0)

    @property
    def total(self) -> int | None:
        """Updates that it will make."""
        total = number(self.plan.get("total_updates"))
        return int(total) if total else None

    @property
    def seconds_left(self) -> float | None:
        """Time to its end, at the pace of its last update."""
        pace = number(self.records.last.get("step_time_sec"))
        if self.state != TRAINING or self.total is None or pace is None:
            return None
        return max(0, self.total - self.updates) * pace

    @property
    def noise_advice(self) -> str:
        """What the noise scale says of the effective batch, as `train` says it at its end, or that
        it is not known; "" before there is a plan."""
        known = {key: number(self.records.last.get(key)) for key in _OF_NOISE}
        try:
            return advice_of_run(self.plan, known) or why_unknown(self.plan)
        except (KeyError, TypeError, ValueError, ArithmeticError):  # no plan, or no one's plan
            return ""

    def _state(self) -> str:
        is_started = self.start is not None and self.start.is_alive
        # One that has written how it ended may still be leaving.
        is_leaving = self.owner is None and self._is_newer_result()
        if self.owner is not None or (is_started and not is_leaving):
            if self.start is not None and is_started and self.start.asked_to_stop:
                return STOPPING
            return TRAINING if self.owner is not None and self._trains_since() else STARTING
        if not self._has_result():
            if self.start is not None and self.start.asked_to_stop:
                return ENDED
            # A run that was started elsewhere and left no result was killed, or its machine was.
            return ENDED if self.start is None else FAILED
        if self.result.get("done"):
            return DONE
        return FAILED if self.result.get("stopped_by") == DIVERGENCE else STOPPED

    def _trains_since(self) -> bool:
        """Whether the plan is of the present start."""
        if self.start is None or not self.start.is_alive:
            return bool(self.plan)
        return changed(self.folder / PLAN) not in (0, self.start.before[0])

    def _has_result(self) -> bool:
        """Whether result.json is of the last start. A run that was complete already writes none
        again."""
        was_complete = self.start is not None and self.start.status == 0
        return self._is_newer_result() or (bool(self.result) and was_complete)

    def _is_newer_result(self) -> bool:
        before = self.start.before[1] if self.start is not None else 0
        return bool(self.result) and changed(self.folder / RESULT) != before

    def _message(self) -> str:
        words = last_words(self.log).strip()
        made = f"{number(self.result.get('updates')) or 0:,.0f} updates"
        if self.state == DONE:
            loss = number(self.result.get("loss"))
            return f"Done after {made}." + ("" if loss is None else f" Last loss {loss:.4f}.")
        if self.state == STOPPED:
            by = self.result.get("stopped_by") or "a signal"
            return f"Stopped by {by} after {made}, and saved. Continue goes on from there."
        if self.state == ENDED:
            return (
                "Stopped before it was done, without saving. Continue goes on from the last "
                "checkpoint, or from the start if there is none."
            )
        if self.state == FAILED:
            return words or self._killed() or "Ended without a word."
        return ""

    def _killed(self) -> str:
        status = self.start.status if self.start is not None else None
        if status is None or status >= 0:
            return ""
        why = ", as the kernel does when memory runs out" if status == -9 else ""
        return f"Killed by signal {-status}{why}."

    def _tail(self) -> str:
        """The end of the log of the last start by a panel, else of the launcher's rank 0."""
        log, begins = self.folder / LOGS / LOG, self.start.log_begins if self.start else 0
        if self.start is None:
            log = self.folder / LOGS / "rank-0.log"
            if is_group(self.folder.parent):  # who started it keeps the output of all of them
                log = self.folder.parent / LOGS / f"{self.folder.name}.log"
        try:
            size = log.stat().st_size
            with open(log, "rb") as file:
                file.seek(max(begins, size - _TAIL_BYTES))
                return as_printed(file.read().decode(errors="replace"))
        except OSError:
            return ""


def json_of(path: Path) -> dict[str, Any]:
    try:
        found = _sendable(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sendable(value: Any) -> Any:
    """The same without half characters, which no page can be sent: JSON may hold any."""
    if isinstance(value, dict):
        return {_sendable(key): _sendable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [*map(_sendable, value)]
    return sendable(value) if isinstance(value, str) else value


def sendable(text: str) -> str:
    """Text for a page; a name of a folder may hold bytes that are no character."""
    return text.encode(errors="replace").decode()
