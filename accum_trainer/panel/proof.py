"""What `accum-trainer verify` found, from the report that it wrote. Runs nothing, knows no page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.launch.last_words import last_words
from accum_trainer.panel.curves import number
from accum_trainer.panel.jobs import Job
from accum_trainer.panel.run_view import json_of

# Beside the runs: the report of the last proof.
PROOF = ".verify.json"


@dataclass(frozen=True)
class Checked:
    """A check of the report.

    Attributes:
        result: PASS, FAIL or INFO.
        error, tolerance: relative; None if nothing was measured. `error` is infinite in a report
            that has no number for it.
        details: lines on a check that failed.
    """

    name: str
    result: str
    meaning: str
    error: float | None
    tolerance: float | None
    details: list[str]


@dataclass(frozen=True)
class Verdict:
    """The answer of a proof that has ended.

    Attributes:
        passed: None if it gave none.
        message: why it gave none.
        engine: what is in force, in one line.
        largest: the check whose error is the largest share of its tolerance.
    """

    passed: bool | None
    message: str = ""
    engine: str = ""
    largest: Checked | None = None
    checks: tuple[Checked, ...] = ()


def verdict_of(job: Job, report: Path) -> Verdict:
    """The verdict of a job that has ended, which writes `report` if it comes to one."""
    found = json_of(report)
    listed = found.get("checks")
    if job.is_stopped or not isinstance(listed, list) or not isinstance(found.get("passed"), bool):
        if job.is_stopped:
            return Verdict(None, "Stopped before it came to a verdict.")
        return Verdict(None, last_words(job.said) or f"It ended with status {job.status}.")
    checks = tuple(_checked(one) for one in listed if isinstance(one, dict))
    measured = [check for check in checks if check.error is not None and check.tolerance]
    return Verdict(
        found["passed"],
        "",
        next((check.meaning for check in checks if check.name == "engine in force"), ""),
        max(measured, key=_share, default=None),
        checks,
    )


def _share(check: Checked) -> float:
    assert check.error is not None and check.tolerance is not None
    return check.error / check.tolerance


def _checked(found: dict[str, Any]) -> Checked:
    error, details = found.get("error"), found.get("details")
    return Checked(
        str(found.get("name")),
        str(found.get("result")),
        str(found.get("meaning")),
        None if error is None else _or_infinite(number(error)),
        number(found.get("tolerance")),
        [str(line) for line in details] if isinstance(details, list) else [],
    )


def _or_infinite(error: float | None) -> float:
    return float("inf") if error is None else error
