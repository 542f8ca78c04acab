"""`verify` is started from Set up and its verdict shown, in a real browser."""

from __future__ import annotations

import json

from playwright.sync_api import expect

from accum_trainer.verify.report import Report, measured
from tests.end_to_end.panel.pages import (
    choose,
    command_of,
    fill,
    good_looks,
    press,
    set_up,
)
from tests.end_to_end.started import process_of, wait_for_end
from tests.launching import shell


def prove(page):
    """Open the part on the proof; the command, and where the verdict will be."""
    if page.get_by_role("button", name="Prove it").is_hidden():  # it is open after a proof
        page.get_by_text("Proof", exact=True).click()
    return page.get_by_label("Proof command"), page.get_by_role("status", name="Verdict")


def test_the_verdict_of_the_configuration_on_the_page(open_page, panels, place):
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
    done = shell(line.inner_text(), place, timeout=120)
    assert done.returncode == 0 and json.loads(report.read_text()) == found
    good_looks(page, "proof")

    page.get_by_role("switch", name="Independent runs side by side").click()
    fill(page, Processes=2)
    choose(page, "Engine", "FSDP2")
    expect(line).to_contain_text("torchrun --standalone --nproc_per_node 2 -m accum_trainer.verify")
    expect(verdict).to_contain_text("This was for another configuration:")
    press(page, "Prove it")
    expect(verdict).to_contain_text("fsdp2 on cpu")
    expect(verdict).to_contain_text("PASS")
    page.reload()
    expect(verdict).to_contain_text("PASS")  # and is open

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
    fill(page, Data_file="rows.jsonl", Batch_size=32)
    expect(page.get_by_label("Proof command")).to_contain_text("--batch-size 32")
    press(page, "Prove it")
    expect(verdict).to_contain_text("Comparing")
    proof = process_of("accum_trainer", "verify", "runs/.verify.json")
    panels.restart()  # a proof is no run: it ends with the panel
    wait_for_end(proof)
    page = open_page()
    fill(page, Batch_size="many")
    prove(page)
    expect(page.get_by_role("button", name="Prove it")).to_have_attribute("aria-disabled", "true")
    expect(page.get_by_label("Proof command")).to_have_text("–")
