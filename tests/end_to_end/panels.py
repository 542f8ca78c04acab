"""A panel that is under way."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.end_to_end.started import Started, accum_trainer
from tests.launching import ROOT

# Pictures of each state, to be looked at.
PICTURES = ROOT / ".pytest_cache" / "panel"


class StartedPanel(Started):
    """`accum-trainer panel runs` in `folder`, on a free port."""

    def __init__(self, folder: Path, *arguments: object, **env: object) -> None:
        # Libraries behave otherwise under pytest, and this is no part of it.
        outside = ["env", "-u", "PYTEST_CURRENT_TEST"]
        command = [*outside, *accum_trainer("panel", "runs", "--port", 0, *arguments)]
        logs = folder / "panel-output"
        logs.mkdir(exist_ok=True)
        super().__init__(command, logs, cwd=folder, **env)
        self.runs = folder / "runs"
        self.until(lambda: "\n" in self.out)
        found = re.search(r"http://\S+?(:\d+)/", self.out)
        assert found is not None, self.out
        self.url = f"http://127.0.0.1{found[1]}"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def end(self) -> None:
        self.signal(signal.SIGTERM)
        self.ended()


@contextlib.contextmanager
def panel_in(folder: Path, *arguments: object, **env: object) -> Iterator[StartedPanel]:
    panel = StartedPanel(folder, *arguments, **env)
    try:
        yield panel
    finally:
        panel.end()
