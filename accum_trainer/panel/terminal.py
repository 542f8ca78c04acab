"""What a terminal leaves of a program's output."""

from __future__ import annotations

import re

# Colours. Of a limited length: each beginning of a sequence is read once per character.
_OF_TERMINALS = re.compile(r"\x1b\[[0-9;?]{0,30}[A-Za-z]")


def as_printed(log: str) -> str:
    """A log as a terminal leaves it: without colours and what a bar overwrote."""
    lines = (line.rstrip("\r") for line in _OF_TERMINALS.sub("", log).split("\n"))
    return "\n".join(line[line.rfind("\r") + 1 :] for line in lines)
