"""How the panel starts a command: in its own Python, without its password. Starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from accum_trainer.launch.process import import_places
from accum_trainer.panel.commands import PROGRAM, TORCHRUN

PASSWORD = "ACCUM_TRAINER_PANEL_PASSWORD"
_MODULES = {PROGRAM: "accum_trainer", TORCHRUN: "torch.distributed.run"}


def python_for(words: Sequence[str]) -> list[str]:
    """The same command in this Python, whatever the PATH holds."""
    return [sys.executable, "-m", _MODULES[words[0]], *words[1:]]


def environment() -> dict[str, str]:
    """Of a process that the panel starts."""
    kept = {name: value for name, value in os.environ.items() if name != PASSWORD}
    return kept | import_places()
