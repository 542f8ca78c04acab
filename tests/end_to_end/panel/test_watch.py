"""Real trainings are watched, stopped and continued in a real browser, R34 and R40; looks."""

from __future__ import annotations

import json
import os
import shutil
import time
from urllib.parse import quote

import psutil
import pytest
from playwright.sync_api import expect

from accum_trainer.train.records import read_records
from tests.end_to_end.panel.pages import (
    LONG,
    choose,
    curves,
    fill,
    good_looks,
    picture,
    press,
    set_up,
    state,
)
from tests.end_to_end.started import Started, accum_trainer
from tests.launching import cli
from tests.made_runs import make_run


def test_a_run_outlives_its_page_and_its_panel(open_page, panels):
    page = open_page()
    set_up(page, "long", updates=LONG)
    press(page, "Start training")
    expect(state(page)).to_have_text("training")
    page.close()
    panels.restart()
    run = panels.runs / "long"
    before = len(read_records(run / "metrics.jsonl"))
    page = open_page("/watch?run=long")
    expect(state(page)).to_have_text("training")
    expect(page.get_by_role("link", name="long training")).to_be_visible()
    page.wait_for_function(
        "n => parseInt(document.querySelector('.progress span').innerText.replace(/,/g, '')) > n",
        arg=before + 5,
    )
    picture(page, "training")
    press(page, "Stop and save")
    expect(state(page)).to_have_text("stopped and saved")
    saved = json.loads((run / "result.json").read_text())
    assert saved["stopped_by"] == "SIGTERM" and not saved["done"]
    assert (run / "last-checkpoint.json").exists()
    press(page, "Continue")
    page.wait_for_function(
        "n => parseInt(document.querySelector('.progress span').innerText.replace(/,/g, '')) > n",
        arg=saved["updates"] + 1,
    )
    expect(state(page)).to_have_text("training")
    press(page, "Stop and save")
    expect(state(page)).to_have_text("stopped and saved")
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > saved["updates"]


def test_a_run_that_was_started_in_a_terminal_is_watched_and_stopped(
    open_page, panels, place, tmp_path
):
    options = ("--cpu", "--dataset-file", "rows.jsonl", "--max-seq-len", 32, "--steps", LONG)
    command = accum_trainer("train", *options, "--output-dir", "runs/terminal")
    started = Started(command, tmp_path, cwd=place)
    started.until(lambda: (panels.runs / "terminal" / "metrics.jsonl").exists())
    page = open_page("/watch?run=terminal")
    expect(state(page)).to_have_text("training")
    expect(page.get_by_text("This run was not started here")).to_be_visible()
    press(page, "Stop and save")
    expect(state(page)).to_have_text("stopped and saved")
    assert started.ended() == 75


def test_a_run_that_fails_says_why(open_page, panels, place):
    (place / "wrong.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    page = open_page()
    set_up(page, "failing", updates=3)
    fill(page, Data_file="wrong.jsonl")
    press(page, "Start training")
    expect(state(page)).to_have_text("failed")
    expect(page.get_by_role("alert")).to_contain_text("error: wrong.jsonl row 2: null value in")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()
    picture(page, "failed")
    # The process of a run that a panel started is waited for.
    time.sleep(1.2)
    assert not [
        child
        for child in psutil.Process(panels.now.process.pid).children()
        if child.status() == psutil.STATUS_ZOMBIE
    ]


def test_a_folder_whose_name_is_no_text_is_listed(open_page, panels):
    run = make_run(panels.runs / os.fsdecode(b"no-text-\xff"))
    page = open_page("/watch")
    page.get_by_role("link", name="no-text-? done").click()
    expect(page.get_by_text("whose name is not UTF-8 cannot be shown: rename it")).to_be_visible()
    shutil.rmtree(run)


def test_what_a_run_directory_holds_is_shown_as_text(open_page, panels):
    evil = "<img src=x onerror=alert(1)>"
    run = make_run(panels.runs / f"of-others {evil}", done=False, stopped_by=evil)
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text(f"a log {evil}\n")
    plan = {"effective_batch_size": evil, "physical_batch_size": evil, "total_updates": evil}
    (run / "plan.json").write_text(json.dumps(plan))
    record = {"step": 1, "loss": 1.0, "lr": evil, "epoch": evil, "num_tokens": evil}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    page = open_page(f"/watch?run={quote(run.name)}")
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    expect(page.get_by_role("heading", name=run.name)).to_be_visible()
    for said in (f"Stopped by {evil} after 10 updates", f"a log {evil}", f"B {evil} × K"):
        expect(page.get_by_text(said)).to_be_visible()
    page.goto(f"{panels.now.url}/watch?run={quote(evil)}")
    expect(page.get_by_text(f"There is no run {evil} in runs.")).to_be_visible()
    assert page.locator("img[src=x]").count() == 0 and not dialogs
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def trained(place):
    """The runs `first` and `second` of the panel's folder; what `first` said at its end."""
    options = ["--cpu", "--dataset-file", "rows.jsonl", "--max-seq-len", 32, "--batch-size", 4]
    own = {
        "first": ["--global-batch-size", 16, "--noise-every", 1, "--steps", 12],
        "second": ["--steps", 4],
    }
    said = {}
    for name, more in own.items():
        run = cli("train", *options, *more, "--output-dir", f"runs/{name}", cwd=place)
        assert run.returncode == 0, run.stderr
        said[name] = run.stdout.splitlines()
    return said["first"]


def test_r54_the_noise_scale_is_said_as_train_says_it(open_page, panels, trained):
    (advice,) = [line for line in trained if line.startswith("noise scale")]
    assert "B_eff 16" in advice
    page = open_page("/watch?run=first")
    said = page.get_by_label("Advice on the effective batch")
    expect(said).to_have_text(advice)
    expect(page.get_by_role("img", name="Noise scale (samples)")).to_be_visible()
    page.get_by_role("link", name="second done").click()
    expect(said).to_contain_text("noise scale not known yet: one window in ")


def test_looks(open_page, panels, trained):
    page = open_page()
    set_up(page, "looks", updates=100)
    fill(page, Batch_size="2")
    page.get_by_role("radio", name="16", exact=True).check()
    expect(page.locator(".warnings")).to_contain_text("B = 2 leaves a device mostly idle")
    page.get_by_role("heading", name="Batch Scaling").click()  # no tooltip in the pictures
    page.mouse.move(0, 0)
    for name, path in (("set-up", None), ("watch", "/watch?run=first")):
        if path is not None:
            page.goto(panels.now.url + path)
            curves(page, "Loss").first.wait_for()
            choose(page, "Compare with", "second")
            page.keyboard.press("Escape")
            expect(page.get_by_role("img", name="Loss")).to_contain_text("second")
            others = page.get_by_role("img", name="Loss").locator("path[stroke='var(--second)']")
            expect(others).not_to_have_count(0)
        good_looks(page, name)
    page.get_by_role("button", name="Theme: auto").click()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    expect(page.locator(".body--dark")).to_have_count(0)
    page.get_by_role("button", name="Theme: light").click()
    page.reload()  # the choice is kept
    expect(page.locator(".body--dark")).to_have_count(1)
