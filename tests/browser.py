"""Debian's Chromium, headless: what a page is once a real browser has read it.

Tests skip without one; where TESTS_NEED_CHROMIUM is set, as in `.ci/run`, that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IS_NEEDED = bool(os.environ.get("TESTS_NEED_CHROMIUM"))
MISSING = "no chromium on this machine: `apt install chromium`"
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not IS_NEEDED, reason=MISSING)


def dom_of(page: Path) -> str:
    """The document of a page, without a server, after its scripts have run."""
    assert CHROMIUM is not None, MISSING
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=5000", f"--user-data-dir={profile}", page.as_uri()),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
