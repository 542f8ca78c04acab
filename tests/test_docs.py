"""Every example of README and docs runs as it is written."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.launching import ROOT, cli, script, shell
from tests.pages import blocks, sections, tasks

# Peers that pages show beside this library.
PEERS = {"lightning", "trl"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [ROOT / name / "README.md" for name in ("examples", "launch_configs")]


def examples():
    elsewhere = [code for codes in tasks().values() for code in codes]  # end_to_end/test_tasks.py
    for page in PAGES:
        for number, (language, code) in enumerate(blocks(page.read_text())):
            # `sh` blocks are the two make commands: the tests are one of them, test_demo runs the
            # other.
            assert language in ("python", "bash", "sh", "text", ""), (
                f"{page.name}: a block in {language}"
            )
            if language in ("python", "bash") and code not in elsewhere:
                # Commands of the guides take a minute of CPU together, launchers more.
                is_first = page.stem in ("README", "quick_start")
                is_slow = language == "bash" and (code.count("launch") > 1 or not is_first)
                yield pytest.param(
                    *(language, code),
                    id=f"{page.stem}-{number}-{language}",
                    marks=[pytest.mark.long] if is_slow else [],
                )


@pytest.mark.parametrize(("language", "code"), list(examples()))
def test_example_runs(language, code, tmp_path):
    for module in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if module in PEERS:
            pytest.importorskip(module, reason=f"{module} is in the extra [bench], not in [dev]")
    shutil.copytree(
        ROOT / "launch_configs", tmp_path / "launch_configs"
    )  # as in the clone that a reader stands in
    run = (script if language == "python" else shell)(code, tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    writes = language == "bash" and "accum_trainer.train" in code.replace(
        "accum-trainer train", "accum_trainer.train"
    )
    assert len(list(tmp_path.iterdir())) > 1 or not writes


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, *LINKED]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in sections(file), f"{page.name} links to {target}#{anchor}"


def test_readme_shows_what_plan_prints():
    readme = (ROOT / "README.md").read_text()
    shown = next(
        block
        for block in re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
        if block.startswith("B   micro")
    )
    command = next(line for line in readme.splitlines() if line.startswith("accum-trainer plan"))
    run = cli(*command.split()[1:])
    assert run.stdout == shown


def test_every_record_key_is_documented(tmp_path):
    from accum_trainer import TrainConfig
    from accum_trainer.train import updates

    config = TrainConfig(steps=1, eval_every=1, cpu=True, output_dir=str(tmp_path / "run"))
    keys = set(next(iter(updates(config))))
    documented = set(
        re.findall(
            r"`(\w+)`",
            "".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs/records.md").read_text(), re.M)),
        )
    )
    assert keys == documented
