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
    # Reset empties each field by a message of its own, after the command's: one that is typed into
    # before would lose that. The answer to another click comes behind them all.
    page.get_by_role("radio", name="32", exact=True).check()
    expect(command_of(page)).to_contain_text("--gradient-accumulation-steps 32 ")
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


def good_looks(page, name, crosswise=False):
    """Pictures of a page, wide and narrow, light and dark: nothing hangs out, all text is
    readable. `crosswise`: wide and light, narrow and dark only, which takes half the time."""
    for width, schemes in ((1280, ("light", "dark")), (390, ("dark", "light"))):
        page.set_viewport_size({"width": width, "height": 844})
        for scheme in schemes[: 1 if crosswise else 2]:
            page.emulate_media(color_scheme=scheme)
            expect(page.locator(".body--dark")).to_have_count(int(scheme == "dark"))
            picture(page, f"{name}-{width}-{scheme}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert least_contrast(page) >= 4.5, (name, width, scheme)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


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
