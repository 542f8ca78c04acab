"""The pages of the documentation as tests read them: headings, code blocks, the eight tasks."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tests.launching import ROOT

QUICK_START = ROOT / "docs" / "quick_start.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return _BLOCK.findall(text)


def anchor(heading: str) -> str:
    """What `#anchor` names this heading, as GitHub and the site spell it."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def sections(page: Path) -> dict[str, str]:
    """The text below each heading, up to the next heading of any level, by anchor."""
    text = page.read_text()
    # `#` begins a comment in code.
    outside = _BLOCK.sub(lambda found: re.sub(r"[^\n]", ".", found[0]), text)
    headings = list(_HEADING.finditer(outside))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {
        anchor(heading[1]): text[heading.end() : end]
        for heading, end in zip(headings, ends, strict=True)
    }


@functools.cache
def tasks() -> dict[str, list[str]]:
    """The blocks that run of each of the eight tasks, where its link in the quick start leads."""
    rows = re.findall(
        r"^\| \[(.+?)\]\(([\w.]*)#([\w-]+)\) \|", sections(QUICK_START)["eight-tasks"], re.M
    )
    return {
        task: [
            code
            for language, code in blocks(
                sections(QUICK_START.with_name(page or QUICK_START.name))[at]
            )
            if language in ("bash", "python")
        ]
        for task, page, at in rows
    }
