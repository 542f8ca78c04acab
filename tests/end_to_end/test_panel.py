"""The panel in a real browser, with real trainings: what a user sees and does, R31 to R34 and
R40."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from urllib.parse import quote

import psutil
import pytest

from accum_trainer.train.records import read_records
from accum_trainer.train.run_lock import owner_of
from tests.end_to_end.panels import PICTURES, StartedPanel, chromium, need
from tests.end_to_end.started import Started, accum_trainer, wait_for_end
from tests.launching import shell
from tests.made_runs import make_run, write_sums

need("nicegui")
expect = need("playwright.sync_api").expect
expect.set_options(timeout=40_000)
LONG = 1_000_000  # updates: a run that a test stops
COMPARED = ("step", "loss", "lr", "grad_norm", "num_targets", "effective_batch_size")


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
    """The panel of this file, which tests end and start again."""

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


def connected(page):
    page.locator("#content:not([inert])").wait_for()


def box(page, label):
    return page.get_by_role("textbox", name=label.replace("_", " "), exact=True)


def fill(page, **texts):
    """Fill in fields by their names: `fill(page, Batch_size=8)`."""
    for label, value in texts.items():
        box(page, label).fill(str(value))


def choose(page, label, option):
    page.get_by_role("combobox", name=re.compile(f"^{label}")).click()
    page.get_by_role("option", name=option, exact=True).click()


def set_up(page, name, updates, batch=8, steps=4):
    """A small training on the sums."""
    page.get_by_role("button", name="Reset").click()
    expect(command_of(page)).to_have_text(re.compile(r"accum-trainer train --output-dir \S+"))
    fill(page, Batch_size=batch, Data_file="rows.jsonl", Name_of_the_run=name, Train_for=updates)
    page.get_by_label("Longest sample (tokens)").fill("32")
    choose(page, "Unit", "updates")
    page.get_by_role("radio", name=f"{steps}", exact=True).check()
    page.get_by_role("switch", name="On the CPU").click()
    expect(command_of(page)).to_contain_text(f"runs/{name}")


def command_of(page):
    return page.get_by_label("Command", exact=True)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def curves(page, name):
    """The lines of a chart, axes aside."""
    return page.get_by_role("img", name=name).locator("path[fill=none][stroke^='var(--accent']")


def state(page):
    return page.locator(".state[role=status]")


def picture(page, name):
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def records(run):
    return [{key: r[key] for key in COMPARED} for r in read_records(run / "metrics.jsonl")]


def test_from_8_by_4_reading_32_to_the_curve_of_the_command_run_by_hand(open_page, panels, place):
    page = open_page()
    set_up(page, "first", updates=4)
    effective = page.locator("output")
    expect(effective).to_have_text("Effective Batch: 32")
    fill(page, Batch_size=16)
    expect(effective).to_have_text("Effective Batch: 64")
    fill(page, Processes=2)
    expect(effective).to_have_text("Effective Batch: 128")
    fill(page, Processes=1, Batch_size=8)
    expect(effective).to_have_text("Effective Batch: 32")
    plan = page.get_by_role("region", name="Plan")
    for line in ("Rows70", "Updates per epoch3, the last of 6 samples", "Updates in all4"):
        expect(plan.locator("dl")).to_contain_text(line)
    typed = command_of(page).inner_text()
    assert typed == (
        "accum-trainer train --batch-size 8 --gradient-accumulation-steps 4 --max-seq-len 32 "
        "--dataset-file rows.jsonl --cpu --steps 4 --output-dir runs/first"
    )
    page.get_by_role("radio", name="1", exact=True).check()
    expect(command_of(page)).not_to_contain_text("accumulation")
    page.get_by_role("radio", name="4", exact=True).check()
    expect(command_of(page)).to_have_text(typed)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press(page, "Copy")
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == typed
    picture(page, "set-up")
    press(page, "Start training")

    expect(state(page)).to_have_text("done")
    expect(page.get_by_text("4 of 4 updates")).to_be_visible()
    for name in ("Loss", "Learning rate", "Gradient norm"):
        lines = page.get_by_role("img", name=name).locator(
            "path[fill=none][stroke^='var(--accent']"
        )
        assert lines.count() >= 1, name
    run = panels.runs / "first"
    result = json.loads((run / "result.json").read_text())
    expect(
        page.get_by_text(f"Done after 4 updates. Last loss {result['loss']:.4f}.")
    ).to_be_visible()
    expect(page.locator(".tiles")).to_contain_text("B 8 × K 4 × W 1")
    picture(page, "done")

    by_hand = place / "by-hand"
    by_hand.mkdir()
    (by_hand / "rows.jsonl").symlink_to(place / "rows.jsonl")
    done = shell(typed, by_hand, timeout=120)
    assert done.returncode == 0, done.stderr
    again = by_hand / "runs" / "first"
    assert records(again) == records(run) and len(records(run)) == 4
    weights = [(at / "model" / "model.safetensors").read_bytes() for at in (run, again)]
    assert weights[0] == weights[1]


def test_two_processes_are_launched_as_the_two_commands_say(open_page, panels, place):
    page = open_page()
    set_up(page, "two", updates=2, batch=4)
    fill(page, Processes=2)
    expect(page.locator("output")).to_have_text("Effective Batch: 32")
    expect(page.locator(".window .rows > div")).to_have_count(2)
    lines = command_of(page).inner_text().splitlines()
    page.get_by_text("Memory per engine").click()
    press(page, "Estimate")
    for engine in ("ddp", "zero3", "fsdp2"):
        expect(page.get_by_role("cell", name=engine, exact=True).first).to_be_visible()
    assert page.locator("tr.used").first.inner_text().split()[0] == "ddp"
    press(page, "Start training")
    expect(state(page)).to_have_text("done")
    plan = json.loads((panels.runs / "two" / "plan.json").read_text())
    assert (plan["world_size"], plan["effective_batch_size"], plan["engine"]) == (2, 32, "ddp")
    create, launch = (line for line in lines if line)
    assert launch.startswith("accum-trainer launch runs/launch-files/ddp_2proc.yaml -- --grad")
    written = (panels.runs / "launch-files" / "ddp_2proc.yaml").read_bytes()
    by_hand = shell(create, place, timeout=60)
    assert by_hand.returncode == 0, by_hand.stderr
    assert (panels.runs / "launch-files" / "ddp_2proc.yaml").read_bytes() == written


def test_what_was_typed_is_there_after_a_reload_and_a_restart(open_page, panels):
    page = open_page()
    set_up(page, "kept", updates=7, batch=2, steps=16)
    page.get_by_role("switch", name="Train LoRA adapters").click()
    fill(page, LoRA_rank=4)
    typed = command_of(page)
    expect(typed).to_contain_text("--use-peft --lora-r 4")
    said = typed.inner_text()
    page.reload()
    expect(typed).to_have_text(said)
    panels.restart()
    page = open_page()
    expect(command_of(page)).to_have_text(said)
    expect(page.get_by_role("textbox", name="Batch size")).to_have_value("2")
    expect(page.get_by_role("radio", name="16", exact=True)).to_be_checked()
    expect(page.get_by_role("switch", name="On the CPU")).to_be_checked()
    expect(page.locator("output")).to_have_text("Effective Batch: 32")


def test_two_pages_are_one_form_and_start_one_run_once(open_page, panels):
    one, two = open_page(), open_page()
    set_up(one, "once", updates=LONG)
    expect(two.locator("output")).to_have_text("Effective Batch: 32")
    expect(two.get_by_role("textbox", name="Batch size")).to_have_value("8")
    two.get_by_role("radio", name="2", exact=True).check()
    expect(one.get_by_role("radio", name="2", exact=True)).to_be_checked()
    fill(two, Batch_size=5)
    expect(one.get_by_role("textbox", name="Batch size")).to_have_value("5")
    press(one, "Start training")
    expect(one).to_have_url(f"{panels.now.url}/watch?run=once")
    press(two, "Start training")
    expect(two.get_by_role("alert").filter(has_text="runs/once is")).to_contain_text("already")
    expect(state(one)).to_have_text("training")
    expect(two.get_by_role("button", name="Continue training")).to_be_visible()
    press(two, "Continue training")
    expect(two.get_by_role("alert").filter(has_text="is training already")).to_be_visible()
    run = panels.runs / "once"
    owner = owner_of(run)
    assert owner is not None
    press(one, "Stop now")
    expect(state(one)).to_have_text("ended without saving")
    wait_for_end(owner.process)
    assert not (run / "result.json").exists()


def test_a_page_takes_nothing_in_before_it_is_connected(open_page, panels):
    """What is typed then is sent later, each key by a timer, so the last need not be the last."""
    page = open_page()
    set_up(page, "early", updates=2)
    page.route_web_socket(re.compile("."), lambda socket: None)  # it never answers
    page.reload()
    size = box(page, "Batch size")
    expect(size).to_have_value("8")
    place = size.bounding_box()
    page.mouse.click(place["x"] + 20, place["y"] + place["height"] / 2)
    page.keyboard.type("123")
    expect(page.locator("#content[inert]")).to_have_count(1)
    expect(size).to_have_value("8")
    page.close()
    page = open_page()
    fill(page, Batch_size=123)
    expect(command_of(page)).to_contain_text("--batch-size 123")


def test_a_double_click_starts_one_run(open_page, panels):
    """Without a name the second would be another run, under the next free name."""
    page = open_page()
    set_up(page, "twice", updates=2)
    fill(page, Name_of_the_run="")
    expect(command_of(page)).not_to_contain_text("runs/twice")
    before = {run.name for run in panels.runs.iterdir()}
    page.get_by_role("button", name="Start training").dblclick()
    expect(state(page)).to_have_text("done")
    assert len({run.name for run in panels.runs.iterdir()} - before) == 1
    page.go_back()
    page.get_by_role("button", name="Start training").click()  # it is a new run now
    expect(state(page)).to_have_text("done")
    assert len({run.name for run in panels.runs.iterdir()} - before) == 2


def test_a_folder_whose_name_is_no_text_is_listed(open_page, panels):
    run = make_run(panels.runs / os.fsdecode(b"no-text-\xff"))
    page = open_page("/watch")
    page.get_by_role("link", name="no-text-? done").click()
    expect(page.get_by_text("whose name is not UTF-8 cannot be shown: rename it")).to_be_visible()
    shutil.rmtree(run)


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


BAD = {
    "B of words": ({"Batch_size": "many"}, "batch_size='many' is not an integer"),
    "B of nothing": ({"Batch_size": "0"}, "batch_size=0 is below 1; give a whole number"),
    "no processes": ({"Processes": "0"}, "processes=0 is below 1"),
    "half a process": ({"Processes": "1.5"}, "processes='1.5' is not an integer"),
    "a rate below 0": ({"Learning_rate": "-1"}, "lr=-1 must be above 0"),
    "a rate of words": ({"Learning_rate": "fast"}, "lr='fast' is not a number"),
    "a warm-up of words": ({"Warm-up": "lots"}, "warmup='lots' is not a warm-up"),
    "more warm-up than run": (
        {"Warm-up": "9", "Train_for": "3"},
        "warmup=9 is 9 updates, but the run has only 3",
    ),
    "no length": ({"Train_for": "-2"}, "steps=-2 is below 1"),
    "no such data": ({"Data_file": "gone.jsonl"}, "data file gone.jsonl does not exist"),
    "data a folder": ({"Data_file": "runs"}, "data file runs is a folder; name one file"),
    "a name that leads out": ({"Name_of_the_run": "../out"}, "run_name=../out is no name of a run"),
}


def test_bad_values_are_said_beside_their_field_and_start_nothing(open_page, panels):
    page = open_page()
    set_up(page, "bad", updates=3)
    before = sorted(run.name for run in panels.runs.iterdir() if run.is_dir())
    start = page.get_by_role("button", name="Start training")
    for name, (texts, message) in BAD.items():
        good = {label: box(page, label).input_value() for label in texts}
        fill(page, **texts)
        said = page.locator(".field.wrong .error").first
        expect(said, name).to_contain_text(message)
        expect(page.locator(".plan .alert")).to_contain_text(message)
        expect(start).to_have_attribute("aria-disabled", "true")
        start.click(force=True)
        if name == "more warm-up than run":
            picture(page, "bad-value")
        fill(page, **good)
        expect(start).not_to_have_attribute("aria-disabled", "true")
    choose(page, "Engine", "FSDP2")
    expect(page.locator(".plan .alert")).to_contain_text("engine=fsdp2 shards over processes")
    assert page.url == f"{panels.now.url}/"
    assert sorted(run.name for run in panels.runs.iterdir() if run.is_dir()) == before


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


def test_keyboard_alone(open_page, panels):
    page = open_page()
    set_up(page, "keys", updates=2)
    page.reload()
    connected(page)
    keys = page.keyboard

    def go_to(name):
        for _ in range(120):
            keys.press("Tab")
            focused = page.evaluate(
                "() => { const e = document.activeElement; return (e.labels && e.labels[0] || e)"
                ".innerText.trim() || e.ariaLabel || e.value }"
            )
            if focused == name:
                return
        raise AssertionError(f"the Tab key does not reach {name}")

    keys.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    go_to("Batch size")
    keys.press("Control+A")
    keys.type("2")
    expect(page.locator("output")).to_have_text("Effective Batch: 8")
    expect(page.get_by_text("samples in one forward and backward")).to_be_visible()  # its tooltip
    keys.press("Tab")  # the radio group, where K = 4 is chosen
    expect(page.get_by_text("4 micro-batches of each process make one update.")).to_be_visible()
    keys.press("ArrowRight")
    expect(page.locator("output")).to_have_text("Effective Batch: 16")
    go_to("Precision")
    keys.press("Enter")
    page.get_by_role("option", name="bf16").wait_for()  # the list is open
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(command_of(page)).to_contain_text("--mixed-precision bf16")
    go_to("Start training")
    keys.press("Enter")
    expect(state(page)).to_have_text("done")
    plan = json.loads((panels.runs / "keys" / "plan.json").read_text())
    assert (plan["effective_batch_size"], plan["mixed_precision"]) == (16, "bf16")


def test_looks(open_page, panels):
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
            choose(page, "Compare with", "two")
            page.keyboard.press("Escape")
            expect(page.get_by_role("img", name="Loss")).to_contain_text("two")
            others = page.get_by_role("img", name="Loss").locator("path[stroke='var(--second)']")
            expect(others).not_to_have_count(0)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                expect(page.locator(".body--dark")).to_have_count(int(scheme == "dark"))
                picture(page, f"{name}-{width}-{scheme}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert least_contrast(page) >= 4.5, (name, width, scheme)
    page.get_by_role("button", name="Theme: auto").click()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    expect(page.locator(".body--dark")).to_have_count(0)
    page.get_by_role("button", name="Theme: light").click()
    page.reload()  # the choice is kept
    expect(page.locator(".body--dark")).to_have_count(1)


def least_contrast(page):
    """The smallest contrast of a visible text and its background (WCAG 2, 1.4.3: at least 4.5)."""
    return page.evaluate(
        """() => {
        const rgb = text => text.match(/[\\d.]+/g).map(Number);
        const lin = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = c => .2126 * lin(c[0]) + .7152 * lin(c[1]) + .0722 * lin(c[2]);
        const ground = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > 0.99) return c; } return [255, 255, 255]; };
        let least = 99;
        for (const e of document.querySelectorAll('#content *, header *')) {
            const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
            if (!own || !e.checkVisibility() || e.closest('svg, [aria-disabled]')) continue;
            const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
            least = Math.min(least, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
        }
        return least; }"""
    )
