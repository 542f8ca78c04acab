"""Whether a batch job goes back into the queue, by what its run directory says.

The status that a batch system gives may be another node's, or that of its own SIGKILL. result.json
says that the run is done, or that it was stopped and saved; its checkpoints say how far it came.
Reads files; knows no batch system.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.errors import AccumTrainerError, CheckpointError
from accum_trainer.launch.node_ending import take_endings
from accum_trainer.launch.signals import STOPPED_AND_SAVED
from accum_trainer.runs.json_file import read_json
from accum_trainer.train.run_folder import CHECKPOINTS, DIVERGENCE, LOGS, RESULT, write_json

REQUEUES = "requeues.json"


@dataclass(frozen=True)
class Verdict:
    """The exit status of a job, 75 if it goes back into the queue, and why."""

    status: int
    reason: str


def decide(run: Path, status: int, batch_start: str | None, max_without_progress: int) -> Verdict:
    """Decide about the job whose training in `run` has ended, and note it there.

    Args:
        status: what the batch system says.
        batch_start: names this start of the job in the notes of `node_ending`.
        max_without_progress: how often in a row it may be requeued without a new update.

    Raises:
        AccumTrainerError: the decision cannot be noted, so it could not be limited.
    """
    statuses = [*take_endings(run / LOGS, batch_start), status]
    result = _read(run / RESULT)
    failed = [one for one in statuses if 0 < one < 128 and one != STOPPED_AND_SAVED]
    if 2 in failed:
        _remove_if_empty(run)
        return Verdict(2, "refused; see the message above")
    if result.get("done") is True:
        (run / LOGS / REQUEUES).unlink(missing_ok=True)
        return Verdict(0, "the run is done")
    if result.get("stopped_by") == DIVERGENCE:
        return Verdict(failed[0] if failed else 1, "diverged, and not requeued")
    updates, before = _updates(run, result), _read(run / LOGS / REQUEUES)
    noted, idle = _number(before.get("updates")), _number(before.get("without_progress"))
    if updates > noted and (result or not failed) and (result or any(statuses)):
        _note(run, updates, 0)
        return Verdict(STOPPED_AND_SAVED, f"stopped, to continue after update {updates}")
    if failed:
        return Verdict(failed[0], "failed, and not requeued; see the message above")
    if not result and not any(statuses):
        return Verdict(0, "ended in order")
    if idle >= max_without_progress:
        return Verdict(
            1,
            f"stopped {idle + 1} times in a row without a new update after update {updates}, and "
            "not requeued: its start, one update and a save must fit into the time limit and the "
            "notice before it; raise them (SLURM: --time, --signal) and submit the job again with "
            f"--output-dir {run}",
        )
    _note(run, updates, idle + 1)
    return Verdict(
        STOPPED_AND_SAVED,
        f"stopped without a new update after update {updates}; to be tried again, "
        f"{max_without_progress - idle - 1} more times without one after this",
    )


def _updates(run: Path, result: dict[str, Any]) -> int:
    """Updates that a next start has: the result's, or the newest checkpoint's."""
    steps = [0, _number(result.get("updates"))]
    for path in (run / CHECKPOINTS).glob("step-*"):
        if (step := re.fullmatch(r"step-(\d+)", path.name)) and path.is_dir():
            steps.append(int(step[1]))
    return max(steps)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _read(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none to read."""
    with contextlib.suppress(CheckpointError):
        return read_json(path)
    return {}


def _note(run: Path, updates: int, without_progress: int) -> None:
    path = run / LOGS / REQUEUES
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"updates": updates, "without_progress": without_progress})
    except OSError as error:
        raise AccumTrainerError(
            f"{path} cannot be written: {error.strerror}; the job is not requeued, because its "
            "requeues could not be counted"
        ) from None


def _remove_if_empty(run: Path) -> None:
    """Leave nothing behind after a refusal."""
    for folder in (run / LOGS, run):
        with contextlib.suppress(OSError):
            folder.rmdir()
