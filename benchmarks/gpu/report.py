"""Outcomes to Markdown: a summary, then one table per part; failures in their own words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.part import PARTS
from benchmarks.gpu.runner import Outcome


def markdown(outcomes: Sequence[Outcome], device: str, versions: str, small: bool) -> str:
    """The whole report."""
    bad = [outcome.part for outcome in outcomes if not outcome.passed]
    verdict = f"Not passed: {', '.join(bad)}." if bad else "All parts passed."
    how = (
        "`python -m benchmarks.gpu --small`, sizes that say nothing about speed"
        if small
        else "`make gpu`"
    )
    lines = [
        f"# {device}",
        "",
        f"{time.strftime('%Y-%m-%d')}, by {how}. {versions}.",
        "",
        f"**{verdict}**",
        "",
        *table(
            ["part", "outcome", "seconds", "run", "code"],
            [_summary(outcome) for outcome in outcomes],
        ),
    ]
    for outcome in outcomes:
        lines += ["", f"## {outcome.part}", "", f"{PARTS[outcome.part][3]}.", "", *_body(outcome)]
    return "\n".join(lines) + "\n"


def _summary(outcome: Outcome) -> list[Any]:
    state = outcome.state
    if outcome.result is not None:
        failed = sum(not check["passed"] for check in outcome.result["checks"])
        state = f"{failed} of {len(outcome.result['checks'])} checks failed" if failed else "passed"
    return [outcome.part, state, f"{outcome.seconds:.0f}", outcome.date, outcome.code]


def _body(outcome: Outcome) -> list[str]:
    if outcome.result is None:
        return [f"{outcome.state}:", "", "```text", outcome.words, "```"]
    lines = table(outcome.result["table"]["header"], outcome.result["table"]["rows"])
    if outcome.result["checks"]:
        checks = [
            [c["name"], "passed" if c["passed"] else "**FAILED**", c["words"]]
            for c in outcome.result["checks"]
        ]
        lines += ["", *table(["check", "outcome", "found"], checks)]
    for note in outcome.result["notes"]:
        lines += ["", note]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[_cell(value) for value in row] for row in [header, ["---"] * len(header), *rows]]
    return [f"| {' | '.join(row)} |" for row in cells]


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
