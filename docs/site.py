"""`make docs`: the README, docs/, examples/ and the benchmarks' results as a site in build/site.

The pages are copied to the places that they have in the repository, so that each relative link
holds on the site, too. It knows nothing of their content. Zensical builds them in strict mode: a
link or an anchor that leads nowhere ends the build. mkdocs.yml has the navigation.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
# Pages, and the files that pages show or link to.
PARTS = [
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/*.md",
    "docs/*.css",
    "docs/*.png",
    "docs/images/*",
    "examples/*.md",
    "examples/*.py",
    "examples/*/*",
    "launch_configs/*",
    "benchmarks/results/*.md",
]


def collect() -> None:
    """Copy every page and picture into an empty build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for part in PARTS:
        for file in sorted(ROOT.glob(part)):
            if file.is_file():
                copy = PAGES / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def main() -> int:
    try:
        import mkdocstrings_handlers.python  # noqa: F401
        import zensical  # noqa: F401
    except ImportError as error:
        print(f"{error.name} is missing: pip install -e '.[docs]'", file=sys.stderr)
        return 2
    collect()
    shutil.rmtree(SITE, ignore_errors=True)
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    status = subprocess.run([*build, "--config-file", "mkdocs.yml"], cwd=ROOT).returncode
    if status == 0:
        place = SITE.relative_to(ROOT)
        # A browser gives files no workers, and the search runs in one.
        print(f"open {place}/index.html; with search: python -m http.server --directory {place}")
    return status


if __name__ == "__main__":
    sys.exit(main())
