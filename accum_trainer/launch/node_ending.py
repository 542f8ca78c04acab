"""How the launcher of each node ended, noted in the run directory for `accum-trainer requeue`.

A batch system gives one status for all nodes, which may hide a refusal on one of them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def note_ending(logs: Path, batch_start: str, node: int, status: int) -> None:
    """Note the exit status of the launcher of `node` in this start of the job. A folder that cannot
    be written is left alone."""
    with contextlib.suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        partial = logs / f".node-{node}.partial"
        partial.write_text(json.dumps({"batch_start": batch_start, "status": status}))
        partial.replace(logs / f"node-{node}.json")


def take_endings(logs: Path, batch_start: str | None) -> list[int]:
    """The statuses noted in this start of the job. All notes are deleted."""
    found = []
    for note in sorted(logs.glob("node-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            read = json.loads(note.read_text())
            if batch_start is not None and read["batch_start"] == batch_start:
                found.append(int(read["status"]))
        with contextlib.suppress(OSError):
            note.unlink()
    return found
