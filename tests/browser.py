"""Debian's Chromium, headless: what a page is once a real browser has read it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def dom_of(page: Path) -> str:
    """The document of a page, without a server, after its scripts have run."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=5000", f"--user-data-dir={profile}", page.as_uri()),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
