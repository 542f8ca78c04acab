"""Debian's Chromium, headless: what a page is once a real browser has read it.

Tests skip without one; where TESTS_NEED_CHROMIUM is set, as in `.ci/run`, that is a failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IS_NEEDED = bool(os.environ.get("TESTS_NEED_CHROMIUM"))
MISSING = "no chromium on this machine: `apt install chromium`"
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not IS_NEEDED, reason=MISSING)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, driven by Playwright; skips, or fails where it is needed, if there is none."""
    if CHROMIUM is None:
        (pytest.fail if IS_NEEDED else pytest.skip)(MISSING)
    # root has no sandbox to give.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def dom_of(page: Path) -> str:
    """The document of a page, without a server, after its scripts have run."""
    assert CHROMIUM is not None, MISSING
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=5000", f"--user-data-dir={profile}", page.as_uri()),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
