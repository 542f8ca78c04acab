"""A browser, a panel that trains in a folder of its own, and pages of it."""

from __future__ import annotations

import os
import signal

import pytest

from accum_trainer.train.run_lock import owner_of
from tests.browser import chromium
from tests.end_to_end.panel.pages import connected
from tests.end_to_end.panels import PICTURES, StartedPanel
from tests.made_runs import write_sums


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory, browser):  # no panel is started for nothing where there is no browser
    folder = tmp_path_factory.mktemp("panel")
    write_sums(folder / "rows.jsonl", 70)
    PICTURES.mkdir(parents=True, exist_ok=True)
    return folder


class Panels:
    """The panel of one file of tests, which end it and start it again."""

    def __init__(self, folder):
        self.folder = folder
        self.now = StartedPanel(folder)

    @property
    def runs(self):
        return self.folder / "runs"

    def restart(self):
        self.now.end()
        self.now = StartedPanel(self.folder)


@pytest.fixture(scope="module")
def panels(place):
    found = Panels(place)
    yield found
    found.now.end()
    for run in found.runs.iterdir():
        owner = owner_of(run)
        if owner is not None:
            os.kill(owner.process, signal.SIGKILL)


@pytest.fixture
def open_page(browser, panels):
    """`open_page(path)`: a new page, of which no request may leave this machine and no script may
    fail."""
    opened, wrong = [], []

    def open_one(path="/", **options):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | options)
        opened.append(page)
        page.set_default_timeout(40_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: outside(request.url))
        page.goto(panels.now.url + path)
        connected(page)
        return page

    def outside(url):
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:")):
            wrong.append(url)

    yield open_one
    for page in opened:
        page.close()
    assert not wrong
