"""Runs are chosen and compared in a real browser, by the figures of `accum-trainer compare`."""

from __future__ import annotations

import json
import random
import shutil

from playwright.sync_api import expect

from tests.end_to_end.panel.pages import choose, good_looks
from tests.launching import cli
from tests.made_runs import make_run

EVIL = "<img src=x onerror=alert(1)>"


def record(folder, batch, noise, updates=60):
    """A run whose loss falls, with noise."""
    draw = random.Random(batch)
    make_run(folder)
    steps = range(1, updates + 1)
    records = [
        {
            "step": step,
            "loss": 3 - step / 100 + noise * draw.gauss(0, 1),
            "effective_batch_size": batch,
            "step_time_sec": 0.5,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def test_two_runs_and_more_as_compare_compares_them(open_page, panels, place):
    record(place / "outside", 2, 0.4)
    page = open_page("/compare?run=../outside&run=..%2Foutside%2F")
    expect(page.get_by_role("status")).to_have_text("There are no runs yet.")
    record(panels.runs / "k1", 2, 0.4)
    record(panels.runs / "k8", 16, 0.1)
    record(panels.runs / "group" / f"k4 {EVIL}", 8, 0.39)
    expect(page.get_by_role("status")).to_have_text("Choose two runs or more.")
    runs = page.get_by_role("navigation", name="Runs")
    runs.get_by_label("k1", exact=True).check()
    runs.get_by_label("k8", exact=True).check()
    line = page.get_by_label("Command", exact=True)
    page.get_by_text("Command", exact=True).click()
    expect(line).to_have_text("accum-trainer compare runs/k1 runs/k8")

    done = cli("compare", "runs/k1", "runs/k8", "--no-picture", cwd=place)
    assert done.returncode == 0, done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("k8: loss variance lower by 9") and verdict.endswith(": yes")
    expect(page.locator(".verdicts li")).to_have_text(f"yes {verdict}")
    # Rows of the table in the terminal: a title, and a cell for each run.
    table = [line for line in done.stdout.split("\n\n")[0].splitlines() if line.strip()][1:]
    rows = page.locator(".figures-of-runs tbody tr")
    expect(rows).to_have_count(len(table))
    for row, printed in zip(rows.all(), table, strict=True):
        cells = [cell.inner_text() for cell in row.locator("th, td").all()]
        assert " ".join(printed.split()) == " ".join(" ".join(cells).split())
    pictures = page.locator(".pictures .wide svg")
    expect(pictures).to_have_count(3)  # by updates, samples and time
    for drawn in pictures.all():
        for number in (0, 1):
            assert drawn.locator(f"[style*='stroke: var(--run-{number})']").count() >= 1
    good_looks(page, "compare")

    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    runs.get_by_label(f"group/k4 {EVIL}").focus()
    page.keyboard.press("Space")  # by the keyboard
    expect(page.locator(".verdicts li")).to_have_count(2)
    expect(page.locator(".verdicts li").last).to_contain_text(f"k4 {EVIL}: loss variance")
    assert page.locator("img[src=x]").count() == 0 and not dialogs
    page.reload()  # the address names what was chosen
    expect(page.locator(".verdicts li")).to_have_count(2)
    with open(panels.runs / "k8" / "metrics.jsonl", "a") as file:  # it trains
        file.write(json.dumps({"step": 61, "loss": 2.345678, "effective_batch_size": 16}) + "\n")
    expect(page.get_by_role("cell", name="2.3457", exact=True)).to_be_visible()
    (panels.runs / "k8" / "metrics.jsonl").write_text("no record\n")
    expect(page.get_by_role("alert")).to_contain_text("has no update")
    shutil.rmtree(panels.runs / "k8")
    expect(page.locator(".verdicts li")).to_have_count(1)

    page.goto(f"{panels.now.url}/watch?run=k1")
    choose(page, "Compare with", f"group/k4 {EVIL}")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Figures").click()
    expect(page.locator(".verdicts li")).to_contain_text(f"k4 {EVIL}: loss variance")
