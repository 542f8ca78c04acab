"""Independent runs side by side, read from their folder alone, like the state of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.errors import CheckpointError
from accum_trainer.panel.curves import number
from accum_trainer.panel.processes import Start
from accum_trainer.panel.run_view import (
    ACTIVE,
    DONE,
    ENDED,
    FAILED,
    STARTING,
    STOPPED,
    STOPPING,
    TRAINING,
    RunView,
    json_of,
    sendable,
)
from accum_trainer.runs.independent_files import (
    INDEPENDENT,
    MERGED,
    REPORT,
    SUMMARY,
    label_of,
    listed_runs,
)
from accum_trainer.train.run_folder import MODEL, holds_run

WAITING = "waiting"


@dataclass(frozen=True)
class Member:
    """One of the runs.

    Attributes:
        name: its folder in the group's.
        label: what sets it apart, `shard 0/2` or `lr=1e-4`.
        view: what it does; None before its training has begun.
        state: of the view, or `waiting`.
        lacks: what is missing until it can be merged; "" if nothing is.
    """

    name: str
    label: str
    view: RunView | None
    state: str
    lacks: str


class GroupView:
    """The runs of one folder.

    Attributes:
        members: in the order of independent.json; none if that cannot be read.
        problem: why it cannot; "" if it can.
        start: the last start of all of them by a panel; log: the end of what it said.
        state: of all of them together, in the words of `run_view`.
        merged: merge.json of the merge that is there; empty without one.
    """

    def __init__(self, folder: Path, name: str, views: Callable[[str], RunView]) -> None:
        """
        Args:
            name: as `find_groups` gives it.
            views: maps the name of a run, as `find_runs` gives it, to its view.
        """
        self.folder, self.name, self._views = folder, name, views
        self.members: list[Member] = []
        self.problem = ""
        self.start: Start | None = None
        self.log = ""
        self.state = ENDED
        self._all = RunView(folder, name)  # for what the process that started all of them says
        self.merged: dict[str, Any] = {}

    def refresh(self, whole: bool = True) -> None:
        """Read what is new.

        Args:
            whole: all records of the runs; else the last one of each only.
        """
        self._all.refresh(whole=False)
        self.start, self.log = self._all.start, self._all.log
        self.merged = json_of(self.folder / MERGED / REPORT)
        try:
            listed = listed_runs(self.folder, f"{INDEPENDENT} is written when they start again")
            self.problem = ""
        except CheckpointError as error:
            listed, self.problem = [], str(error)
        reasons = self._reasons()
        self.members = [
            self._member(sendable(name), settings, reasons.get(name, ""), whole)
            for name, settings in listed
        ]
        self.state = self._state()

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def is_done(self) -> bool:
        return self.state == DONE

    def _reasons(self) -> dict[str, str]:
        """Why runs failed, by their names, as the last end of all wrote it."""
        runs = json_of(self.folder / SUMMARY).get("runs")
        found = {}
        for run in runs if isinstance(runs, list) else []:
            if isinstance(run, dict) and run.get("state") == "failed":
                found[str(run.get("name"))] = str(run.get("reason") or "failed")
        return found

    def _member(self, name: str, settings: dict[str, Any], reason: str, whole: bool) -> Member:
        label = sendable(label_of(settings))
        if not holds_run(self.folder / name):
            return Member(name, label, None, WAITING, reason or "has not begun")
        view = self._views(f"{self.name}/{name}")
        is_settled = not view.is_active and bool(view.records.last)
        view.refresh(at_most_every_sec=5.0 if is_settled else 0.4, whole=whole)
        return Member(name, label, view, view.state, _lacks(view, reason))

    def _state(self) -> str:
        states = {member.state for member in self.members}
        if self.start is not None and self.start.is_alive:
            if self.start.asked_to_stop:
                return STOPPING
            return TRAINING if states & {TRAINING, DONE} else STARTING
        if states & set(ACTIVE):
            return TRAINING
        if states == {DONE}:
            return DONE
        if FAILED in states or self._reasons():
            return FAILED
        return STOPPED if STOPPED in states else ENDED


def _lacks(view: RunView, reason: str) -> str:
    made = f"{view.updates:,} of {view.total:,} updates made" if view.total else ""
    if view.is_active:
        return made or "its first update"
    if view.state != DONE:
        return "; ".join(filter(None, (made or "no update made", reason)))
    return "" if (view.folder / MODEL).is_dir() else f"{MODEL}/ is missing"


def loss_of(view: RunView, key: str = "loss") -> float | None:
    """The last loss of a run, or of its evaluations."""
    if key == "loss":
        return number(view.records.last.get("loss"))
    known = [value for value in view.records.columns[key] if value is not None]
    return known[-1] if known else None
