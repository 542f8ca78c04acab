"""The page Watch: the runs of the folder, and what one of them does."""

from __future__ import annotations

import html
import time
from typing import Any
from urllib.parse import quote

from nicegui import ui

from accum_trainer.errors import AccumTrainerError
from accum_trainer.panel.charts import OTHERS, draw_column, draw_loss
from accum_trainer.panel.curves import number
from accum_trainer.panel.processes import how_to_continue, start_again, stop, stop_now
from accum_trainer.panel.run_list import RunList
from accum_trainer.panel.run_view import (
    DONE,
    SAID,
    RunView,
    find_runs,
    is_group,
    sendable,
)
from accum_trainer.panel.shell import (
    Panel,
    button,
    command_html,
    complain,
    last_lines,
    log_box,
    markup,
    new_chart,
    shell,
    text,
)
from accum_trainer.train.progress import clock_time

_REFRESH_SEC = 1.0


class WatchPage:
    """One open page, on one run or on none yet."""

    def __init__(self, panel: Panel, name: str) -> None:
        self._panel, self._form = panel, panel.form
        names = find_runs(panel.runs)
        self._view: RunView | None = None
        if name in names or (not name and names):
            self._view = panel.view(name or names[0])
        with shell(panel, "/watch"), ui.element("div").classes("watch"):
            with ui.element("nav").classes("runs").props('aria-label="Runs"'):
                text("Runs", "h2")
                self._list = RunList(panel, self._view.name if self._view else None)
            with ui.element("div").classes("run"):
                if self._view is not None:
                    self._run()
                elif name:
                    text(_no_run(name, panel), "p", "nothing")
                else:
                    markup('No runs yet. <a href="/">Set one up.</a>', "p", "nothing")
        self._drawn: tuple[Any, Any] = ((), ())
        self._drawn_at = 0.0
        self._show()
        ui.timer(_REFRESH_SEC, self._show)

    def _run(self) -> None:
        assert self._view is not None
        with ui.element("header").classes("title"):
            text(sendable(self._view.name), "h1")
            self._state = markup("", "span", "state").props("role=status")
            with ui.element("div").classes("actions"):
                self._stop = button("Stop and save", self._pressed_stop)
                self._stop_now = button("Stop now", self._pressed_stop_now, "danger")
                self._continue = button("Continue", self._pressed_continue, "primary")
        with ui.element("div").classes("progress"):
            self._bar = ui.element("progress").props('aria-label="Updates made" max=1 value=0')
            self._progress = text("", "span")
        self._message = text("", "pre", "message").props("role=alert")
        self._tiles = markup("", "dl", "tiles")
        self._advice = text("", "p", "advice").props('aria-label="Advice on the effective batch"')
        self._curves = ui.element("div").classes("curves")
        with self._curves:
            self._charts()
        self._log = log_box(is_open=True)
        with ui.element("details"):
            text("Command", "summary")
            self._command = text("", "pre", "command").props('aria-label="Command" tabindex=0')

    def _charts(self) -> None:
        with ui.element("section").classes("chart large").props('aria-label="Loss"'):
            with ui.element("div").classes("head"):
                text("Loss", "h2")
                with ui.element("div").classes("field choice"):
                    text("Compare with", "label").props("for=compare")
                    self._others = ui.select([], multiple=True, on_change=self._show).props(
                        "for=compare borderless dense options-dense behavior=menu "
                        f"max-values={len(OTHERS)}"
                    )
                self._compare = text("Figures", "a")
                ui.switch(
                    "Log axis", value=bool(self._form.view["log_axis"]), on_change=self._set_log
                ).props("dense")
                with ui.element("label").classes("smoothing"):
                    text("Smoothing", "span")
                    weight = self._form.view["smoothing"]
                    ui.slider(
                        min=0, max=0.98, step=0.02, value=weight, on_change=self._set_smoothing
                    ).props('aria-label="Smoothing" dense')
            self._loss = new_chart("Loss")
        with ui.element("div").classes("charts"):
            self._columns = {
                key: self._column(key, name)
                for key, name in (
                    ("lr", "Learning rate"),
                    ("grad_norm", "Gradient norm"),
                    ("noise_scale", "Noise scale (samples)"),
                )
            }

    def _column(self, key: str, name: str) -> tuple[ui.element, ui.echart, str]:
        with ui.element("section").classes("chart").props(f'aria-label="{name}"') as place:
            text(name, "h2")
            chart = new_chart(name)
        return place, chart, name

    def _show(self) -> None:
        names, view = self._list.show(), self._view
        others = [name for name in names if view is not None and name != view.name]
        others = [name for name in others if name == sendable(name)]
        if view is not None and self._others.options != others:
            kept = [name for name in self._others.value if name in others]
            self._others.set_options(others, value=kept)
        if view is not None:
            query = "&".join(f"run={_quoted(name)}" for name in (view.name, *self._others.value))
            self._compare.props(f'href="/compare?{query}"')
            self._compare.set_visibility(bool(self._others.value))
        if view is None:
            if names and self._panel.view(names[0]).is_active:
                ui.navigate.to(f"/watch?run={_quoted(names[0])}")
            return
        if is_group(view.folder):  # it was a start of independent runs, which are there now
            ui.navigate.reload()
            return
        view.refresh()
        self._state.set_content(SAID[view.state])
        self._state.classes(replace=f"state {view.state}")
        self._stop.set_visibility(view.is_active)
        self._stop_now.set_visibility(view.is_active)
        self._continue.set_visibility(not view.is_active and view.state != DONE)
        self._show_progress(view)
        self._message.set_content(html.escape(view.message))
        self._message.classes(replace=f"message {view.state}")
        self._tiles.set_content(_tiles(view))
        advice = view.noise_advice
        self._advice.set_content(html.escape(advice))
        self._advice.set_visibility(bool(advice))
        self._log.set_content(
            last_lines(view.log)
            or "This run was not started here: its output is where it was started."
        )
        self._command.set_content(_command(view))
        self._draw(view)

    def _show_progress(self, view: RunView) -> None:
        done, total = view.updates, view.total
        self._bar.props(f"max={total or 1} value={min(done, total or 1)}")
        said = f"{done:,} of {total:,} updates" if total else f"{done:,} updates"
        epoch = number(view.records.last.get("epoch"))
        said += f" · epoch {epoch:.2f}" if epoch is not None else ""
        left = view.seconds_left
        said += f" · {clock_time(left)} left" if left is not None and view.updates else ""
        self._progress.set_content(html.escape(said))

    def _draw(self, view: RunView) -> None:
        log, weight = bool(self._form.view["log_axis"]), float(self._form.view["smoothing"])
        others = {name: self._panel.view(name).records for name in self._others.value}
        for name in others:
            self._panel.view(name).refresh()
        # A run that went back to an earlier checkpoint has new records of the same number.
        seen = [(len(one), one.last) for one in (view.records, *others.values())]
        settings = (list(others), log, weight)
        # A long curve changes little in a second, and takes longer to draw.
        is_soon = time.monotonic() - self._drawn_at < len(view.records) / 10_000
        if (seen, settings) == self._drawn or (is_soon and settings == self._drawn[1]):
            return
        self._drawn, self._drawn_at = (seen, settings), time.monotonic()
        self._curves.set_visibility(len(view.records) > 0)
        draw_loss(self._loss.options, view.records, log, weight, others)
        self._loss.update()
        for key, (place, chart, name) in self._columns.items():
            has_any = any(value is not None for value in view.records.columns[key])
            place.set_visibility(has_any or key != "noise_scale")
            draw_column(chart.options, view.records, key, name)
            chart.update()

    def _set_log(self, event: Any) -> None:
        self._form.set_view("log_axis", bool(event.value))
        self._show()

    def _set_smoothing(self, event: Any) -> None:
        self._form.set_view("smoothing", float(event.value))
        self._show()

    def _pressed_stop(self) -> None:
        self._do(stop)

    def _pressed_stop_now(self) -> None:
        self._do(stop_now)

    def _pressed_continue(self) -> None:
        self._do(start_again)

    def _do(self, action: Any) -> None:
        assert self._view is not None
        try:
            action(self._view.folder)
        except AccumTrainerError as error:
            complain(error)
        self._view.refresh(at_most_every_sec=0)
        self._show()


def _no_run(name: str, panel: Panel) -> str:
    said = f"There is no run {name} in {panel.runs}."
    if "?" in name:  # what such a name is sent as
        said += " A folder whose name is not UTF-8 cannot be shown: rename it."
    return said


def _quoted(name: str) -> str:
    return quote(sendable(name))


def _tiles(view: RunView) -> str:
    last, plan = view.records.last, view.plan
    batch = [plan.get(key) for key in ("physical_batch_size", "world_size", "effective_batch_size")]
    shown: list[tuple[str, str, str]] = []

    def tile(name: str, value: str | None, more: str = "") -> None:
        if value is not None:
            shown.append((name, value, more))

    def figure(key: str, form: str = "{:.4g}") -> str | None:
        value = number(last.get(key))
        return None if value is None else form.format(value)

    steps = number(last.get("gradient_accumulation_steps"))
    if batch[2] is not None:
        parts = (
            f"B {batch[0]} × K {plan.get('gradient_accumulation_steps') or 'any'} × W {batch[1]}"
        )
        tile("Effective batch", f"{batch[2]}", parts)
    elif steps is not None:
        tile("Effective batch", figure("effective_batch_size", "{:.0f}"))
    evaluated = [value for value in view.records.columns["eval_loss"] if value is not None]
    tile("Loss", figure("loss", "{:.4f}"), f"evaluation {evaluated[-1]:.4f}" if evaluated else "")
    peak = number(plan.get("lr"))
    tile("Learning rate", figure("lr", "{:.3g}"), f"peak {peak:g}" if peak is not None else "")
    tile("Gradient norm", figure("grad_norm", "{:.3f}"), "before clipping")
    tile("Noise scale", figure("noise_scale", "{:,.0f} samples"), _interval(last))
    tile("Speed", figure("tokens_per_sec", "{:,.0f} tokens/s"), _waiting(last))
    tile("Useful positions", figure("padding_efficiency", "{:.1%}"), "the rest is padding")
    tile(
        "Memory",
        figure("memory_gb", "{:.2f} GB"),
        f"peak {figure('peak_gb', '{:.2f}') or 'unknown'} GB",
    )
    tile("MFU", figure("mfu", "{:.1%}"), "of the device's peak")
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(more)}</small></dd></div>"
        for name, value, more in shown
    )


def _interval(last: dict[str, Any]) -> str:
    low, high = number(last.get("noise_scale_low")), number(last.get("noise_scale_high"))
    return f"{low:,.0f} to {high:,.0f}" if low is not None and high is not None else ""


def _waiting(last: dict[str, Any]) -> str:
    waited, took = number(last.get("data_wait_sec")), number(last.get("step_time_sec"))
    return f"{waited / took:.0%} waits for data" if waited is not None and took else ""


def _command(view: RunView) -> str:
    try:
        return command_html(how_to_continue(view.folder)[1])
    except AccumTrainerError as error:
        return html.escape(sendable(str(error)))
