"""The report of `verify`: a list of checks, for people and as JSON. Knows nothing of models."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, INFO = "PASS", "FAIL", "INFO"


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        result: PASS, FAIL or INFO.
        error, tolerance: relative, if something was measured; PASS means error <= tolerance.
        meaning: one sentence for a person.
        details: lines shown below the table.
    """

    name: str
    result: str
    meaning: str
    error: float | None = None
    tolerance: float | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The subject of a verification and all its checks; equal on all ranks."""

    subject: dict[str, Any]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.result != FAIL for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"passed", "subject", "checks"}; a non-finite error is written as text."""
        return {
            "passed": self.passed,
            "subject": self.subject,
            "checks": [
                {k: _for_json(v) for k, v in dataclasses.asdict(check).items()}
                for check in self.checks
            ],
        }


def _for_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measured(
    name: str,
    error: float,
    tolerance: float,
    meaning: str,
    otherwise: str | None = None,
    details: tuple[str, ...] = (),
) -> Check:
    """A check that passes if `error` is within `tolerance`; nan fails. `otherwise` replaces
    `meaning` in a failure."""
    passed = error <= tolerance
    return Check(
        name,
        PASS if passed else FAIL,
        meaning if passed else otherwise or meaning,
        error,
        tolerance,
        details,
    )
