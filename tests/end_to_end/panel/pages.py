"""How tests use the panel's pages, and find what is on them."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from accum_trainer.train.records import read_records
from tests.end_to_end.panels import PICTURES

expect.set_options(timeout=40_000)
LONG = 1_000_000  # updates: a run that a test stops
COMPARED = ("step", "loss", "lr", "grad_norm", "num_targets", "effective_batch_size")


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
    page.evaluate("scrollTo(0, 0)")  # else the header lies where it was scrolled to
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def records(run):
    return [{key: r[key] for key in COMPARED} for r in read_records(run / "metrics.jsonl")]
