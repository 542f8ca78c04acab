"""A training is set up and started in a real browser, R31 to R33."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from accum_trainer.train.run_lock import owner_of
from accum_trainer.verify.report import Report, measured
from tests.end_to_end.panel.pages import (
    LONG,
    box,
    choose,
    command_of,
    connected,
    curves,
    fill,
    good_looks,
    picture,
    press,
    records,
    set_up,
    state,
)
from tests.end_to_end.started import process_of, wait_for_end
from tests.launching import shell


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
        assert curves(page, name).count() >= 1, name
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


def prove(page):
    """Open the part on the proof; the command, and where the verdict will be."""
    if page.get_by_role("button", name="Prove it").is_hidden():  # it is open after a proof
        page.get_by_text("Proof", exact=True).click()
    return page.get_by_label("Proof command"), page.get_by_role("status", name="Verdict")


def test_the_verdict_of_the_configuration_on_the_page(open_page, panels):
    page = open_page()
    set_up(page, "proven", updates=3, batch=2, steps=2)
    page.get_by_role("switch", name="Independent runs side by side").click()
    page.get_by_label("GPUs, or slots of the CPU").fill("0,1")
    expect(command_of(page)).to_contain_text("--parallel-independent")
    line, verdict = prove(page)
    expect(line).to_have_text(
        "accum-trainer verify --batch-size 2 --gradient-accumulation-steps 2 --max-seq-len 32 "
        "--dataset-file rows.jsonl --cpu --steps 3 --json runs/.verify.json"
    )
    press(page, "Prove it")
    press(page, "Stop")
    expect(verdict).to_contain_text("Stopped before it came to a verdict.")
    press(page, "Prove it")
    expect(page.get_by_role("button", name="Prove it")).to_have_attribute("aria-disabled", "true")
    expect(verdict).to_contain_text("PASS")
    report = panels.runs / ".verify.json"
    found = json.loads(report.read_text())
    checks = {check["name"]: check for check in found["checks"]}
    engine = checks["engine in force"]["meaning"]
    assert engine.startswith("single on cpu") and "B 2 x K 2 x W 1" in engine
    expect(verdict).to_contain_text(engine)
    worst = max(
        (check for check in found["checks"] if check["error"] is not None),
        key=lambda check: check["error"] / check["tolerance"],
    )
    expect(verdict).to_contain_text(
        f"Largest error {worst['error']:.1e}, at most {worst['tolerance']:.1e} ({worst['name']})"
    )
    row = verdict.get_by_role("row", name="logged loss")
    expect(row).to_contain_text(f"{checks['logged loss']['error']:.1e}")
    good_looks(page, "proof", crosswise=True)

    failed = measured("tail window", 0.25, 2e-6, "right", "<b>wrong</b> by far", ("line 1",))
    report.write_text(json.dumps(Report({}, [failed]).to_dict()))
    expect(verdict.locator(".chip.FAIL")).to_have_text("FAIL")
    expect(verdict).to_contain_text("Largest error 2.5e-01, at most 2.0e-06 (tail window)")
    expect(verdict.locator("pre")).to_have_text("<b>wrong</b> by far\nline 1")


def test_why_there_is_no_verdict_is_said(open_page, panels, place):
    (place / "wrong.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    page = open_page()
    set_up(page, "unproven", updates=3)
    fill(page, Data_file="wrong.jsonl")
    expect(page.get_by_label("Proof command")).to_contain_text("wrong.jsonl")
    _, verdict = prove(page)
    press(page, "Prove it")
    expect(verdict).to_contain_text("error: wrong.jsonl row 2: null value in")
    expect(verdict).to_contain_text("no verdict")
    fill(page, Batch_size="many")
    prove(page)
    expect(page.get_by_role("button", name="Prove it")).to_have_attribute("aria-disabled", "true")
    expect(page.get_by_label("Proof command")).to_have_text("–")


@pytest.mark.long
def test_a_proof_on_two_processes_and_one_that_ends_with_the_panel(open_page, panels):
    page = open_page()
    set_up(page, "sharded", updates=3, batch=2, steps=2)
    line, verdict = prove(page)
    fill(page, Processes=2)
    choose(page, "Engine", "FSDP2")
    expect(line).to_contain_text("torchrun --standalone --nproc_per_node 2 -m accum_trainer.verify")
    press(page, "Prove it")
    expect(verdict).to_contain_text("fsdp2 on cpu")
    expect(verdict).to_contain_text("PASS")
    page.reload()
    expect(verdict).to_contain_text("PASS")  # and is open
    fill(page, Batch_size=32)
    expect(verdict).to_contain_text("This was for another configuration:")
    expect(line).to_contain_text("--batch-size 32")
    press(page, "Prove it")
    expect(verdict).to_contain_text("Comparing")
    proof = process_of("torch.distributed.run", "runs/.verify.json")
    panels.restart()
    wait_for_end(proof)


@pytest.mark.long
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
