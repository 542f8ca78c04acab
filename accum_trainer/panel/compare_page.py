"""The page Compare: runs of the folder, chosen, and how they differ."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from nicegui import ui

from accum_trainer.errors import AccumTrainerError
from accum_trainer.launch.quoting import words as quoted
from accum_trainer.panel.commands import compare_words
from accum_trainer.panel.comparing import Compared, Drawn, compared
from accum_trainer.panel.processes import changed
from accum_trainer.panel.run_view import find_runs, sendable
from accum_trainer.panel.shell import Panel, command_html, markup, shell, text
from accum_trainer.runs.report import DARK_COLOURS
from accum_trainer.train.loss_picture import COLOURS
from accum_trainer.train.run_folder import METRICS

_REFRESH_SEC = 2.0
# Runs that train are compared again, for at most this share of the time.
_LEAST_BETWEEN_SEC, _SHARE = 3.0, 0.25


class ComparePage:
    """One open page; `chosen` are the names of the runs that it begins with."""

    def __init__(self, panel: Panel, chosen: Sequence[str]) -> None:
        self._panel = panel
        self._names: list[str] = []
        self._chosen = [*dict.fromkeys(chosen)]
        # What is shown, or being made: the runs and when their records changed.
        self._of: object = None
        self._is_busy, self._again_at = False, 0.0
        ui.add_css(_colours())
        with shell(panel, "/compare"), ui.element("div").classes("watch"):
            with ui.element("nav").classes("runs").props('aria-label="Runs"'):
                text("Runs", "h2")
                self._list = ui.element("ul")
            with ui.element("div").classes("run"):
                text("Compare", "h1")
                self._said = text("", "p", "soft").props("role=status")
                self._wrong = text("", "pre", "message failed").props("role=alert")
                self._found = markup("", "div", "compared")
                self._details = ui.element("details")
                with self._details:
                    text("Command", "summary")
                    self._command = text("", "pre", "command").props(
                        'aria-label="Command" tabindex=0'
                    )
        self._show()
        ui.timer(_REFRESH_SEC, self._show)

    def _show(self) -> None:
        names = [
            name
            for name in find_runs(self._panel.runs)
            if name == sendable(name) and (self._panel.runs / name / METRICS).is_file()
        ]
        # Also what an address names: anything else would be a path of anywhere.
        self._chosen = [name for name in self._chosen if name in names]
        if sorted(names) != self._names:
            self._names = sorted(names)
            self._show_list()
        if not self._is_busy:
            self._is_busy = True
            # Not awaited: the timer goes on, and the page answers meanwhile.
            task = asyncio.ensure_future(self._compare())
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)

    def _show_list(self) -> None:
        self._list.clear()
        with self._list:
            for name in self._names:
                with ui.element("li"), ui.element("label"):
                    checked = "checked" if name in self._chosen else ""
                    box = ui.element("input").props(f"type=checkbox {checked}")
                    box.on("change", lambda name=name: self._toggled(name), [])
                    text(name, "b")

    def _toggled(self, name: str) -> None:
        if name in self._chosen:
            self._chosen.remove(name)
        else:
            self._chosen.append(name)
        query = "&".join(f"run={quote(one)}" for one in self._chosen)
        ui.navigate.history.replace(f"/compare?{query}")
        self._again_at = 0.0
        self._show()

    async def _compare(self) -> None:
        """Compare what is chosen now, unless that is shown."""
        try:
            while True:
                chosen = [*self._chosen]
                folders = [self._panel.runs / name for name in chosen]
                times = [changed(folder / METRICS) for folder in folders]
                wanted = (chosen, times, bool(self._names))
                if wanted == self._of or time.monotonic() < self._again_at:
                    return
                self._of = wanted
                await self._compare_these(folders)
                if self._found.is_deleted or chosen == self._chosen:
                    return
        finally:
            self._is_busy = False

    async def _compare_these(self, folders: list[Path]) -> None:
        began, said, wrong, found = time.monotonic(), "", "", ""
        if len(folders) < 2:
            said = "Choose two runs or more." if self._names else "There are no runs yet."
        else:
            self._said.set_content("Comparing …")
            try:
                found = _as_html(await asyncio.to_thread(compared, folders))
            except AccumTrainerError as error:
                wrong = sendable(str(error))
        if self._found.is_deleted:
            return
        took = time.monotonic() - began
        self._again_at = time.monotonic() + max(_LEAST_BETWEEN_SEC, took / _SHARE)
        self._said.set_content(said)
        self._wrong.set_content(html.escape(wrong))
        self._found.set_content(found)
        self._details.set_visibility(len(folders) > 1)
        self._command.set_content(command_html([quoted(compare_words(folders))]))


# Of pages that may be closed before they end.
_tasks: set[asyncio.Future[None]] = set()


def _colours() -> str:
    """The colours of the runs, of which the pictures speak, light and dark."""

    def names(colours: Sequence[str]) -> str:
        return " ".join(f"--run-{place}: {colour};" for place, colour in enumerate(colours))

    return f":root {{ {names(COLOURS)} }} .body--dark {{ {names(DARK_COLOURS)} }}"


def _as_html(found: Compared) -> str:
    verdicts = "".join(
        f'<li><span class="chip {"none" if verdict not in ("yes", "no") else verdict}">'
        f"{verdict or 'not known'}</span> {html.escape(sentence)}</li>"
        for verdict, sentence in found.verdicts
    )
    legend = "".join(
        f'<li><i style="background: var(--run-{place % len(COLOURS)})"></i>{html.escape(name)}</li>'
        for place, name in enumerate(found.names)
    )
    notes = "".join(f'<p class="soft">Note: {html.escape(note)}</p>' for note in found.notes)
    return (
        f'<section class="card"><h2>Is the loss steadier?</h2><ul class="verdicts">{verdicts}</ul>'
        f'<p class="soft">Yes: at least 50 % lower than that of {html.escape(found.baseline)}. '
        f"{html.escape(found.variance)}</p>{_picture(found.variances)}</section>"
        f'<section class="card"><h2>Loss</h2><ul class="legend">{legend}</ul>'
        f'<div class="pictures">{"".join(map(_titled, found.curves))}</div></section>'
        f'<section class="card"><h2>Figures</h2>{_table(found)}{notes}</section>'
    )


def _titled(drawn: Drawn) -> str:
    return f"<figure><figcaption>{drawn.title}</figcaption>{_picture(drawn)}</figure>"


def _picture(drawn: Drawn) -> str:
    return f'<div class="wide">{drawn.wide}</div><div class="narrow">{drawn.narrow}</div>'


def _table(found: Compared) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in found.names)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(title)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for title, cells in found.rows
    )
    return (
        '<div class="scroll" tabindex="0" aria-label="Figures"><table class="figures-of-runs">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
