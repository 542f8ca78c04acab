"""A finding, and the report that findings make. Knows no check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# `limit`: training runs, and what the finding names does not. `fail`: training would not run.
OK, LIMIT, FAIL = "ok", "limit", "fail"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of what was checked.
        says: what was found, in words.
        state: OK, LIMIT or FAIL.
        remedy: a command, or what to do, that mends it; "" if all is well.
        lacks: what does not work because of it. A finding that lacks something optional may be OK.
        data: the same for programs.
    """

    name: str
    says: str
    state: str = OK
    remedy: str = ""
    lacks: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def limit_if(
        cls,
        is_limited: bool,
        name: str,
        says: str,
        remedy: str,
        lacks: tuple[str, ...],
        data: dict[str, Any],
    ) -> Finding:
        """A limit with its remedy and what it lacks; OK without them if there is none."""
        if is_limited:
            return cls(name, says, LIMIT, remedy, lacks, data)
        return cls(name, says, data=data)


@dataclass(frozen=True)
class Report:
    """All findings.

    Attributes:
        findings: in the order they are shown.
    """

    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: Iterable[Finding], needs: Iterable[str]) -> Report:
        """The report for someone who needs `needs`: what lacks one of these has failed."""
        wanted = set(needs)
        return cls(
            tuple(
                replace(found, state=FAIL) if wanted & set(found.lacks) else found
                for found in findings
            )
        )

    @property
    def can_train(self) -> bool:
        """Whether training, with what was asked for, can run."""
        return not any(found.state == FAIL for found in self.findings)

    def named(self, state: str) -> list[str]:
        """The names of the findings in this state."""
        return [found.name for found in self.findings if found.state == state]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "can_train": self.can_train,
            "findings": [asdict(found) for found in self.findings],
        }
