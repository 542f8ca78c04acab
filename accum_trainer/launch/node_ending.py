"""How the processes of each node ended, noted in the run directory.

Read by `accum-trainer requeue`, because a batch system gives one status for all nodes, which may
hide a refusal on one of them; and by nodes that start again together.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Ending:
    """How a start ended on a node.

    Attributes:
        status: the exit status of its launcher.
        batch_start: the start of the batch job that it belonged to.
        restart: its number among the starts of its launcher, from 0; -1 if nobody starts again.
        is_last: whether the launcher will not start again.
        written: when, in ns; tells a note that was read from an earlier one.
    """

    status: int
    batch_start: str | None = None
    restart: int = -1
    is_last: bool = True
    written: int = 0


def note_ending(logs: Path, ending: Ending, node: int) -> None:
    """Write the note of `node`. A folder that cannot be written is left alone."""
    with contextlib.suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        partial = logs / f".node-{node}.partial"
        partial.write_text(json.dumps(asdict(ending)))
        partial.replace(_note(logs, node))


def ending_of(logs: Path, node: int) -> Ending | None:
    """The note of `node`; None if there is none that can be read."""
    return _read(_note(logs, node))


def take_endings(logs: Path, batch_start: str | None) -> list[int]:
    """The statuses noted in this start of the job. All notes are deleted."""
    found = []
    for note in sorted(logs.glob("node-*.json")):
        ending = _read(note)
        if ending is not None and batch_start is not None and ending.batch_start == batch_start:
            found.append(ending.status)
        with contextlib.suppress(OSError):
            note.unlink()
    return found


def _note(logs: Path, node: int) -> Path:
    return logs / f"node-{node}.json"


def _read(note: Path) -> Ending | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        written = note.stat().st_mtime_ns
        return replace(Ending(**json.loads(note.read_text())), written=written)
    return None
