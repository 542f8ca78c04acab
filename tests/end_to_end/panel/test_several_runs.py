"""Several runs in a real browser: compared, by the figures of `accum-trainer compare`; independent
ones started, seen side by side and merged."""

from __future__ import annotations

import json
import random
import re
import time
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from accum_trainer.train.run_lock import owner_of
from tests.end_to_end.panel.pages import (
    LONG,
    box,
    choose,
    command_of,
    fill,
    good_looks,
    press,
    set_up,
    state,
)
from tests.end_to_end.started import wait_for_end
from tests.launching import cli
from tests.made_runs import list_runs, make_run

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


@pytest.mark.long
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
    good_looks(page, "compare", crosswise=True)

    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    runs.get_by_label(f"group/k4 {EVIL}").focus()
    page.keyboard.press("Space")  # by the keyboard
    expect(page.locator(".verdicts li")).to_have_count(2)
    expect(page.locator(".verdicts li").last).to_contain_text(f"k4 {EVIL}: loss variance")
    assert page.locator("img[src=x]").count() == 0 and not dialogs
    assert page.url.endswith("/compare?run=k1&run=k8&run=" + quote(f"group/k4 {EVIL}"))
    with open(panels.runs / "k8" / "metrics.jsonl", "a") as file:  # it trains
        file.write(json.dumps({"step": 61, "loss": 2.345678, "effective_batch_size": 16}) + "\n")
    expect(page.get_by_role("cell", name="2.3457", exact=True)).to_be_visible()
    (panels.runs / "k8" / "metrics.jsonl").write_text("no record\n")
    expect(page.get_by_role("alert")).to_contain_text("has no update")

    page.goto(f"{panels.now.url}/watch?run=k1")
    choose(page, "Compare with", f"group/k4 {EVIL}")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Figures").click()
    expect(page.locator(".verdicts li")).to_contain_text(f"k4 {EVIL}: loss variance")


@pytest.mark.long
def test_shares_are_started_seen_side_by_side_and_merged(open_page, panels, place):
    page = open_page()
    set_up(page, "shares", updates=3, batch=4, steps=2)
    page.get_by_role("switch", name="Independent runs side by side").click()
    expect(page.locator(".plan .alert")).to_contain_text("on a CPU needs cuda_ids")
    page.get_by_label("GPUs, or slots of the CPU").fill("0,1")
    expect(command_of(page)).to_contain_text("--parallel-independent --cuda-ids 0,1")
    figures = page.get_by_role("region", name="Plan").locator("dl")
    for line in ("Runs2, each on its share of the rows", "Rows70", "epoch5, the last of 3"):
        expect(figures).to_contain_text(line)
    fill(page, Processes=2)
    expect(page.locator(".plan .alert")).to_contain_text("processes=2 share a gradient")
    fill(page, Processes=1)
    expect(command_of(page)).to_contain_text("--cuda-ids 0,1")
    press(page, "Start training")

    rows = page.locator(".members tbody tr")
    expect(rows).to_have_count(2)
    expect(state(page)).to_have_text("done")
    for place_of, row in enumerate(rows.all()):
        loss = json.loads((panels.runs / f"shares/part-{place_of}/result.json").read_text())["loss"]
        for said in (f"part-{place_of}", f"shard {place_of}/2", "done", "3 / 3", f"{loss:.4f}"):
            expect(row).to_contain_text(said)
        expect(row.locator("td").last).to_have_text("nothing")
    lines = page.get_by_role("img", name="Loss").locator("path[fill=none][stroke^='var(--']")
    expect(lines.nth(1)).to_be_attached()

    line = page.get_by_label("Merge command")
    expect(line).to_have_text("accum-trainer merge runs/shares")
    box(page, "Evaluate on").fill("rows.jsonl")
    merge = "accum-trainer merge runs/shares --eval-file rows.jsonl"
    expect(line).to_have_text(merge)
    press(page, "Merge")
    said = page.get_by_role("status", name="Merged")
    expect(said).to_contain_text("runs/shares/merged: the mean of 2 models")
    merged = panels.runs / "shares" / "merged"
    weights = (merged / "model.safetensors").read_bytes()
    loss = json.loads((merged / "merge.json").read_text())["eval_loss"]
    assert f"{loss:.4f}" in said.inner_text()
    expect(page.get_by_text(f"of 2 runs, evaluation loss {loss:.4f}")).to_be_visible()

    before = (merged / "merge.json").stat().st_mtime_ns
    press(page, "Merge")  # nothing is overwritten in silence
    expect(said).to_contain_text("holds a merge already; choose another folder, or replace it")
    assert (merged / "merge.json").stat().st_mtime_ns == before
    page.get_by_role("switch", name="Replace the earlier merge").click()
    expect(line).to_have_text(f"{merge} --force")
    good_looks(page, "independent", crosswise=True)
    press(page, "Merge")
    expect(said).to_contain_text(f"{merge} --force")
    expect(said).to_contain_text("the mean of 2 models")
    assert (merged / "merge.json").stat().st_mtime_ns > before
    expect(line).to_have_text(merge)

    done = cli(*merge.split()[1:], "-o", "by-hand", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "by-hand" / "model.safetensors").read_bytes() == weights

    page.get_by_role("link", name=re.compile("^part-1 ")).click()
    expect(page.get_by_role("heading", name="shares/part-1")).to_be_visible()
    expect(page.get_by_role("img", name="Gradient norm")).to_be_visible()


@pytest.mark.long
def test_all_of_them_are_stopped_and_continued(open_page, panels):
    page = open_page()
    set_up(page, "halting", updates=LONG, batch=1, steps=1)
    page.get_by_role("switch", name="Independent runs side by side").click()
    page.get_by_label("GPUs, or slots of the CPU").fill("0,1")
    expect(command_of(page)).to_contain_text("--cuda-ids 0,1")
    press(page, "Start training")
    lacks = page.locator(".members td:last-child")
    for row in (0, 1):
        expect(lacks.nth(row)).to_contain_text("of 1,000,000 updates made")
    press(page, "Stop and save")
    expect(state(page)).to_have_text("stopped and saved")
    parts = [panels.runs / "halting" / f"part-{number}" for number in (0, 1)]
    for part in parts:
        assert json.loads((part / "result.json").read_text())["stopped_by"] == "SIGTERM"
    press(page, "Continue")
    expect(state(page)).to_have_text("training")
    owner = wait_for_owner(parts[0])
    press(page, "Stop now")
    wait_for_end(owner.process)
    expect(page.get_by_role("button", name="Continue")).to_be_visible()
    assert not any(owner_of(part) for part in parts)


def wait_for_owner(run):
    deadline = time.monotonic() + 60
    while (owner := owner_of(run)) is None:
        assert time.monotonic() < deadline, f"{run} is not trained"
        time.sleep(0.05)
    return owner


def test_what_a_run_lacks_is_said_and_a_merge_without_it_is_refused(open_page, panels):
    group = list_runs(panels.runs / "halted", "part-0", "part-1", "part-2")
    make_run(group / "part-0")
    make_run(group / "part-1", done=False, stopped_by="SIGTERM", updates=4)
    (group / "part-1" / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    summary = [{"name": "part-2", "state": "failed", "reason": "error: <b>no rows</b>"}]
    (group / "summary.json").write_text(json.dumps({"runs": summary}))
    page = open_page("/watch?run=halted")
    lacks = page.locator(".members td:last-child")
    expect(lacks).to_have_text(
        ["model/ is missing", "4 of 10 updates made", "error: <b>no rows</b>"]
    )
    expect(state(page)).to_have_text("failed")
    page.get_by_role("switch", name="Also unfinished runs").click()
    expect(page.get_by_label("Merge command")).to_contain_text("halted --allow-unfinished")
    press(page, "Merge")
    said = page.get_by_role("status", name="Merged")
    expect(said).to_contain_text("error: part-2 of runs/halted is missing: independent.json lists")
    (group / "independent.json").write_text("[]")
    expect(page.get_by_role("alert")).to_contain_text("independent.json holds a list, not an")
