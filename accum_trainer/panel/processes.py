"""Start and stop runs: each is a process in its own session, which outlives page and panel.

A note in the user's cache names the process, so that a panel that is started later, or beside this
one, finds it. It is not in the run directory, which may come from anyone: what it said would be
started and signalled. Knows no page; asks nothing of a run but its lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from accum_trainer.data.files import private_cache
from accum_trainer.errors import ConfigError
from accum_trainer.launch.files import launch_files, write_files
from accum_trainer.launch.folders import make_folder, private
from accum_trainer.launch.process import send_signal, start_of
from accum_trainer.launch.quoting import words as quoted
from accum_trainer.panel.commands import PROGRAM, Command
from accum_trainer.panel.programs import environment, python_for
from accum_trainer.runs.independent_files import INDEPENDENT, listed_runs
from accum_trainer.runs.inside import check_inside
from accum_trainer.train import durable
from accum_trainer.train.run_folder import CONFIG, LOGS, PLAN, RESULT
from accum_trainer.train.run_lock import one_at_a_time, owner_of

LOG = "panel.log"
# Processes that this panel started: waited for, so that they do not stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Start:
    """The last start of a run by a panel.

    Attributes:
        folder: the run directory.
        process, started: its process (`start_of` tells it from a later one with its number).
        words: of the command; lines: the same as typed, with the one that writes a launch file.
        log_begins: bytes of the log that earlier starts wrote.
        before: `changed` of plan.json and result.json: what was there is of an earlier start.
        asked_to_stop: the stop was asked for.
        status: the exit status, if the panel that started it saw its end.
    """

    folder: str
    process: int
    started: int | None
    words: list[str]
    lines: list[str]
    log_begins: int
    before: list[int]
    asked_to_stop: bool = False
    status: int | None = None

    @property
    def is_alive(self) -> bool:
        if self.started is None or self.status is not None:
            return False
        child = _children.get(self.process)
        if child is not None and child.poll() is not None:
            return False
        try:
            is_dead = psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
        return not is_dead and start_of(self.process) == self.started


def read_start(folder: Path) -> Start | None:
    """The last start by a panel; None if there was none. Notes the exit status, once known."""
    try:
        found = Start(**json.loads(note_of(folder).read_text(encoding="utf-8")))
        found = replace(found, process=int(found.process), before=[*map(int, found.before)])
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    child = _children.get(found.process)
    if found.status is None and child is not None and child.poll() is not None:
        found = replace(found, status=child.returncode)
        with contextlib.suppress(OSError):  # then it is noted the next time
            _write(found)
            del _children[found.process]
    return found


def changed(file: Path) -> int:
    """When it was written last, in nanoseconds of its own clock; 0 if there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def note_of(folder: Path) -> Path:
    """The file that says how a run was started."""
    place = os.path.realpath(folder)
    return private_cache("panel") / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"


def _write(start: Start) -> None:
    note = note_of(Path(start.folder))
    durable.write_text(note, json.dumps(asdict(start)) + "\n")
    for other in note.parent.glob("*.json"):  # of runs that are gone
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if not Path(json.loads(other.read_text(encoding="utf-8"))["folder"]).exists():
                other.unlink()


def start(command: Command, folder: Path) -> None:
    """Start the command in this process's folder; its output goes to logs/panel.log.

    Raises:
        ConfigError: the run trains or starts already, here or elsewhere; or nothing can be written.
        CheckpointError: its log is a link that leads out of its folder.
    """
    if command.launch is not None:
        write_files(launch_files(*command.launch), force=True)
    _start(command.words, command.lines, folder)


def start_again(folder: Path) -> None:
    """Continue a run that was stopped or has failed, by the command that it was started with.

    Raises:
        ConfigError: it is not known how; or as for `start`.
    """
    words, lines = how_to_continue(folder)
    _start(words, lines, folder)


def how_to_continue(folder: Path) -> tuple[list[str], list[str]]:
    """The command that continues a run: its words, and the lines that one would type.

    Raises:
        ConfigError: the run was started elsewhere on several processes.
    """
    before = read_start(folder)
    if before is not None:
        return before.words, before.lines
    with contextlib.suppress(OSError, ValueError, AttributeError):
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if plan.get("world_size") == 1:
            config = ["--config", str(folder / CONFIG), "--resume", "auto"]
            words = [PROGRAM, "train", *config, "--output-dir", str(folder)]
            return words, [quoted(words)]
    raise ConfigError(
        f"{folder} was started elsewhere, on several processes or before it had a plan; give its "
        "own command again, which continues it"
    )


def _start(words: Sequence[str], lines: Sequence[str], folder: Path) -> None:
    make_folder(folder / LOGS)
    check_inside(folder / LOGS / LOG, folder, "remove the link")
    try:
        with one_at_a_time(folder):  # of two panels, and of two pages of one
            _check_is_idle(folder)
            log = folder / LOGS / LOG
            begins = log.stat().st_size if log.exists() else 0
            before = [changed(folder / name) for name in (PLAN, RESULT)]
            with open(log, "ab", opener=private) as output:
                child = subprocess.Popen(
                    python_for(words),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
            _children[child.pid] = child
            place = os.path.realpath(folder)
            known = (place, child.pid, start_of(child.pid), list(words), list(lines))
            try:
                _write(Start(*known, begins, before))
            except OSError as error:  # a run that no panel would know
                child.kill()
                child.wait()
                del _children[child.pid]
                raise ConfigError(
                    f"{folder} was not started: its process cannot be noted in {error.filename} "
                    f"({error.strerror}); make room or mend that, or set ACCUM_TRAINER_CACHE"
                ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be started: {error.strerror or error}; look at its folder, or choose "
            "another name"
        ) from None


def _check_is_idle(folder: Path) -> None:
    owner, before = owner_of(folder), read_start(folder)
    if owner is not None:
        raise ConfigError(
            f"{folder} is training already: process {owner.process} on {owner.host}, since "
            f"{owner.since}; watch it, or choose another name"
        )
    if before is not None and before.is_alive:
        raise ConfigError(
            f"{folder} is being started already (process {before.process}); watch it, or choose "
            "another name"
        )
    if (folder / INDEPENDENT).is_file():
        for name, _ in listed_runs(folder, "choose another name"):
            _check_is_idle(folder / name)


def stop(folder: Path) -> None:
    """Ask the run to save and stop after its update (SIGTERM).

    Raises:
        ConfigError: it does not run, or not on this machine.
    """
    _signal(folder, [_running(folder)], signal.SIGTERM)


def stop_now(folder: Path) -> None:
    """Kill the run and all its processes; what it did since its last checkpoint is lost.

    Raises:
        ConfigError: it does not run, or not on this machine.
    """
    first = _running(folder)
    family = [first]
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(first[0]).children(recursive=True):
            if (began := start_of(child.pid)) is not None:
                family.append((child.pid, began))
    _signal(folder, family, signal.SIGKILL)


def _signal(folder: Path, family: list[tuple[int, int]], number: int) -> None:
    """Signal processes (number, start) of a run, and note that it was asked to stop."""
    for process, began in family:
        send_signal(process, began, number)
    started = read_start(folder)
    if started is not None and (started.process, started.started) == family[0]:
        _write(replace(started, asked_to_stop=True))


def _running(folder: Path) -> tuple[int, int]:
    """The run's first process and its start: the one that a panel started, else the one that
    trains."""
    started = read_start(folder)
    if started is not None and started.started is not None and started.is_alive:
        return started.process, started.started
    owner = owner_of(folder)
    if owner is None:
        raise ConfigError(f"{folder} does not run, so there is nothing to stop")
    if not owner.is_here or owner.started is None:
        raise ConfigError(
            f"{folder} is trained by process {owner.process} on {owner.host}, out of this panel's "
            "reach; stop it there"
        )
    return owner.process, owner.started
