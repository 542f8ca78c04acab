"""Why a process failed, by the end of its log."""

from __future__ import annotations

_LAST_LINES = 40


def last_words(log: str) -> str:
    """The error message in a log, or its last traceback, or its last lines."""
    lines = log.splitlines()
    errors = [line for line in lines if line.startswith("error")]
    if errors:
        return errors[-1]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    return "\n".join((lines[starts[-1] :] if starts else lines)[-_LAST_LINES:])
