"""The documentation as a site: complete, strict, and nothing in it comes from elsewhere."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from pathlib import Path

import pytest
import yaml

import accum_trainer
from tests.browser import chromium
from tests.launching import ROOT, python

SITE = ROOT / "build" / "site"
# What a browser loads with a page.
LOADED = r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["']?([^"'\s>]+)"""
STYLES = r"""<link\b[^>]*?\brel=["']?(?:stylesheet|icon|preload|preconnect|manifest)[^>]*>"""


def pages_of(nav):
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from pages_of(target)


@pytest.fixture(scope="module")
def site():
    run = python(ROOT / "docs" / "site.py", timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return SITE


def test_every_page_is_in_the_navigation_once():
    nav = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    pages |= {"README.md", "CHANGELOG.md", "examples/README.md", "launch_configs/README.md"}
    assert not pages - set(nav), f"not in the nav of mkdocs.yml: {sorted(pages - set(nav))}"
    assert not set(nav) - pages, f"in the nav, but no page: {sorted(set(nav) - pages)}"
    assert len(nav) == len(set(nav))


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("[gone](gone.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ndocs_dir: pages\nsite_dir: site\n")
    run = python("-m", "zensical", "build", "--strict", cwd=tmp_path, fresh=True)
    assert run.returncode != 0 and "page does not exist" in re.sub(r"\x1b\[[\d;]*m", "", run.stderr)


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text()
        loaded = [*re.findall(LOADED, text), *re.findall(STYLES, text)]
        away = [one for one in loaded if re.search(r"(https?:)?//", one)]
        assert not away, f"{page.relative_to(site)} loads {away}"
    for style in site.rglob("*.css"):
        assert not re.search(r"""(url\(["']?|@import ["']?)(https?:)?//""", style.read_text()), (
            style
        )


def test_the_reference_has_every_public_name(site):
    text = (site / "docs" / "reference.html").read_text()
    ids = set(re.findall(r'id="?(accum_trainer[\w.]*)', text))
    public = {f"accum_trainer.{name}" for name in accum_trainer.__all__}
    assert public | {"accum_trainer.train.updates", "accum_trainer.train.Run"} <= ids
    assert "micro_batch_size" in text and "B, most samples in one" in text


def test_a_browser_reads_and_searches_it_alone(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served = f"http://127.0.0.1:{server.server_port}"
    asked: list[str] = []
    try:
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.on("request", lambda request: asked.append(request.url))
            page.goto(Path(site, "docs", "window.html").as_uri())  # without a server
            widths = page.evaluate(
                "[...document.querySelectorAll('article img')].map(i => i.width)"
            )
            assert len(widths) == 4 and min(widths) > 300
            page.goto(f"{served}/index.html")
            page.get_by_role("button", name="Search").first.click()
            page.get_by_placeholder("Search").fill("gradient_divisor")
            page.locator(f"a[href='{served}/docs/exactness.html']").first.wait_for()
    finally:
        server.shutdown()
        server.server_close()
    assert asked and not [url for url in asked if not url.startswith(("file:", served))]
