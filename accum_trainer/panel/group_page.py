"""The page Watch for independent runs: all of them side by side, and their merge."""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import quote

from nicegui import ui

from accum_trainer.errors import AccumTrainerError
from accum_trainer.launch.quoting import words as quoted
from accum_trainer.panel.charts import draw_side_by_side
from accum_trainer.panel.commands import merge_words
from accum_trainer.panel.group_view import GroupView, Member, loss_of
from accum_trainer.panel.processes import how_to_continue, start_again, stop, stop_now
from accum_trainer.panel.run_list import RunList
from accum_trainer.panel.run_view import SAID, sendable
from accum_trainer.panel.shell import (
    Panel,
    button,
    command_html,
    complain,
    enable,
    last_lines,
    log_box,
    markup,
    new_chart,
    shell,
    text,
)
from accum_trainer.runs.independent_files import MERGED

_REFRESH_SEC = 1.0
_COLUMNS = ("Run", "State", "Updates", "Loss", "Evaluation", "Lacks for a merge")


class GroupPage:
    """One open page on the independent runs of one folder."""

    def __init__(self, panel: Panel, name: str) -> None:
        self._panel, self._form = panel, panel.form
        self._group = panel.group(name)
        self._drawn: Any = None
        with shell(panel, "/watch"), ui.element("div").classes("watch"):
            with ui.element("nav").classes("runs").props('aria-label="Runs"'):
                text("Runs", "h2")
                self._list = RunList(panel, name)
            with ui.element("div").classes("run"):
                self._header()
                self._message = text("", "pre", "message failed").props("role=alert")
                with ui.element("section").classes("card").props('aria-label="Side by side"'):
                    self._table = markup("", "div")
                with ui.element("section").classes("chart large").props('aria-label="Loss"'):
                    with ui.element("div").classes("head"):
                        text("Loss", "h2")
                        self._compare = text("Compare them", "a")
                    self._loss = new_chart("Loss")
                self._merge_card()
                self._log = log_box(is_open=False)
                with ui.element("details"):
                    text("Command", "summary")
                    self._command = text("", "pre", "command").props(
                        'aria-label="Command" tabindex=0'
                    )
        self._show()
        ui.timer(_REFRESH_SEC, self._show)

    def _header(self) -> None:
        with ui.element("header").classes("title"):
            text(sendable(self._group.name), "h1")
            self._state = markup("", "span", "state").props("role=status")
            with ui.element("div").classes("actions"):
                self._stop = button("Stop and save", lambda: self._do(stop))
                self._stop_now = button("Stop now", lambda: self._do(stop_now), "danger")
                self._continue = button("Continue", lambda: self._do(start_again), "primary")

    def _merge_card(self) -> None:
        with ui.element("section").classes("card").props("aria-labelledby=merge"):
            text("Merge", "h2").props("id=merge")
            text(
                "One model: the mean of the runs' weights, each counted by the samples that it was "
                "trained on.",
                "p",
                "soft",
            )
            with ui.element("div").classes("field"):
                text("Evaluate on", "label").props("for=merge-eval-file")
                self._eval_file = ui.input(
                    placeholder="the runs' own evaluation rows, or rows.jsonl, .csv, …",
                    on_change=self._show,
                ).props("for=merge-eval-file borderless dense spellcheck=false autocomplete=off")
            with ui.element("div").classes("options"):
                self._unfinished = ui.switch("Also unfinished runs", on_change=self._show)
                self._unfinished.props("dense")
                self._force = ui.switch("Replace the earlier merge", on_change=self._show)
                self._force.props("dense")
            self._there = text("", "p", "soft")
            self._merge_line = text("", "pre", "command").props(
                'aria-label="Merge command" tabindex=0'
            )
            with ui.element("div").classes("actions"):
                self._merge = button("Merge", self._pressed_merge)
            self._merge_said = text("", "pre", "said").props('role=status aria-label="Merged"')

    def _show(self) -> None:
        self._list.show()
        group = self._group
        group.refresh()
        self._state.set_content(SAID[group.state])
        self._state.classes(replace=f"state {group.state}")
        is_ours = group.start is not None and group.start.is_alive
        self._stop.set_visibility(is_ours)
        self._stop_now.set_visibility(is_ours)
        self._continue.set_visibility(not group.is_active and not group.is_done)
        self._message.set_content(html.escape(group.problem))
        self._table.set_content(_table(group))
        try:
            shown = command_html(how_to_continue(group.folder)[1])
        except AccumTrainerError:
            shown = "Started elsewhere: the same command there stops and continues them."
        self._command.set_content(shown)
        self._log.set_content(last_lines(group.log) or "Their output is where they were started.")
        self._draw()
        self._show_merge()

    def _draw(self) -> None:
        log, weight = bool(self._form.view["log_axis"]), float(self._form.view["smoothing"])
        runs = {
            f"{member.name} {member.label}".strip(): member.view.records
            for member in self._group.members
            if member.view is not None
        }
        query = [
            f"run={quote(f'{self._group.name}/{member.name}')}"
            for member in self._group.members
            if member.view is not None
        ]
        self._compare.props(f'href="/compare?{"&".join(query)}"')
        self._compare.set_visibility(len(query) > 1)
        drawn = ([(name, len(one), one.last) for name, one in runs.items()], log, weight)
        if drawn != self._drawn:
            self._drawn = drawn
            draw_side_by_side(self._loss.options, runs, log, weight)
            self._loss.update()

    def _words(self) -> list[str]:
        """The command of the merge, as the switches stand that can be seen."""
        group = self._group
        force = bool(group.merged) and bool(self._force.value)
        unfinished = not group.is_done and bool(self._unfinished.value)
        return merge_words(group.folder, self._eval_file.value.strip(), force, unfinished)

    def _show_merge(self) -> None:
        group, job = self._group, self._panel.jobs.of(self._subject)
        is_running = job is not None and job.is_running
        self._unfinished.set_visibility(not group.is_done)
        self._force.set_visibility(bool(group.merged))
        self._there.set_visibility(bool(group.merged))
        self._there.set_content(html.escape(_earlier(group)))
        line = job.line if job is not None and is_running else quoted(self._words())
        self._merge_line.set_content(command_html([line]))
        enable(self._merge, not is_running)
        failed = job is not None and not is_running and job.status != 0
        self._merge_said.classes(replace="said failed" if failed else "said")
        if job is None:
            self._merge_said.set_content("")
            return
        said = job.said or ("…" if is_running else f"status {job.status}")
        self._merge_said.set_content(command_html([f"$ {job.line}"]) + html.escape(sendable(said)))

    @property
    def _subject(self) -> str:
        return f"merge {self._group.name}"

    def _pressed_merge(self) -> None:
        try:
            self._panel.jobs.start(self._subject, self._words())
        except OSError as error:
            complain(f"the merge cannot be started: {error.strerror or error}")
        self._force.set_value(False)  # what it replaces now was not asked for
        self._show()

    def _do(self, action: Any) -> None:
        try:
            action(self._group.folder)
        except AccumTrainerError as error:
            complain(error)
        self._show()


def _earlier(group: GroupView) -> str:
    """What is said of the merge that is there."""
    parts, loss = group.merged.get("parts"), group.merged.get("eval_loss")
    of = f" of {len(parts)} runs" if isinstance(parts, list) else ""
    evaluated = f", evaluation loss {loss:.4f}" if isinstance(loss, float) else ""
    return f"{group.folder / MERGED} holds a merge{of}{evaluated}. It is not overwritten unasked."


def _table(group: GroupView) -> str:
    if not group.members:
        return ""
    head = "".join(f"<th scope=col>{name}</th>" for name in _COLUMNS)
    rows = "".join(_row(group, member) for member in group.members)
    return f'<table class="members"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _row(group: GroupView, member: Member) -> str:
    view, name = member.view, html.escape(member.name)
    if view is not None:
        name = f'<a href="/watch?run={quote(f"{group.name}/{member.name}")}">{name}</a>'
    made = "" if view is None else f"{view.updates:,} / {view.total or '?'}"
    losses = [None, None] if view is None else [loss_of(view), loss_of(view, "eval_loss")]
    state = SAID.get(member.state, member.state)
    cells = [
        f"{name}<small>{html.escape(member.label)}</small>",
        f'<i class="dot {member.state}"></i>{state}',
        html.escape(made),
        *("–" if loss is None else f"{loss:.4f}" for loss in losses),
        html.escape(sendable(member.lacks)) or "nothing",
    ]
    return (
        "<tr>"
        + "".join(
            f'<td data-name="{title}">{cell}</td>'
            for title, cell in zip(_COLUMNS, cells, strict=True)
        )
        + "</tr>"
    )
