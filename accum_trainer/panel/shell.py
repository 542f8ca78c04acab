"""The frame of every page, and controls for fields."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nicegui import context, ui

from accum_trainer.panel.charts import base
from accum_trainer.panel.form import Field, Form
from accum_trainer.panel.group_view import GroupView
from accum_trainer.panel.jobs import Jobs
from accum_trainer.panel.row_counts import RowCounts
from accum_trainer.panel.run_view import RunView, sendable

_CSS = (Path(__file__).parent / "panel.css").read_text(encoding="utf-8")
# Four micro-batches that add up to one update.
_GLYPH = (
    '<svg viewBox="0 0 24 24" width="24" height="24" aria-hidden="true">'
    '<g fill="#0f9d8f"><rect x="2" y="3" width="5" height="4" rx="1" opacity=".45"/>'
    '<rect x="2" y="8" width="5" height="4" rx="1" opacity=".6"/>'
    '<rect x="2" y="13" width="5" height="4" rx="1" opacity=".8"/>'
    '<rect x="2" y="18" width="5" height="4" rx="1"/>'
    '<rect x="13" y="3" width="9" height="19" rx="2"/></g>'
    '<path d="M8.5 12.5h2.6" stroke="#0f9d8f" stroke-width="1.6" stroke-linecap="round"/></svg>'
)
FAVICON = _GLYPH.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
_LOG_LINES = 200
_PAGES = (("/", "Set up"), ("/watch", "Watch"), ("/compare", "Compare"))
_THEMES: dict[str, bool | None] = {"auto": None, "light": False, "dark": True}


class Panel:
    """Shared by all pages.

    Attributes:
        runs: the folder of run directories.
        jobs: the commands that pages wait for.
    """

    def __init__(self, runs: Path, form: Form, rows: RowCounts) -> None:
        self.runs, self.form, self.rows = runs, form, rows
        self.jobs = Jobs()
        self._views: dict[str, RunView] = {}
        self._groups: dict[str, GroupView] = {}

    def view(self, name: str) -> RunView:
        """The run of this name, one of `find_runs`."""
        if name not in self._views:
            self._views[name] = RunView(self.runs / name, name)
        return self._views[name]

    def group(self, name: str) -> GroupView:
        """The independent runs of this name, one of `find_groups`."""
        if name not in self._groups:
            self._groups[name] = GroupView(self.runs / name, name, self.view)
        return self._groups[name]


def text(content: str, tag: str = "div", classes: str = "") -> ui.html:
    """An element with this text, which may be anyone's."""
    return markup(html.escape(content), tag, classes)


def markup(content: str, tag: str = "div", classes: str = "") -> ui.html:
    """An element with this HTML, in which all that others wrote is escaped."""
    return ui.html(content, sanitize=False, tag=tag).classes(classes)


def button(name: str, pressed: Any, classes: str = "") -> ui.element:
    """A button; `pressed` takes no argument."""
    with ui.element("button").props("type=button").classes(classes) as made:
        text(name, "span")
    made.on("click", pressed, [])
    return made


def enable(element: ui.element, is_enabled: bool) -> None:
    """Let a button say whether pressing it does anything; it can be reached all the same."""
    if is_enabled:
        element.props(remove="aria-disabled")
    else:
        element.props("aria-disabled=true")


def new_chart(name: str) -> ui.echart:
    """A chart without curves yet."""
    return ui.echart(base(name), renderer="svg").props(f'role=img aria-label="{name}"')


def log_box(is_open: bool) -> ui.html:
    """A part that can be folded, with the end of a log."""
    with ui.element("details").classes("log").props("open" if is_open else ""):
        text("Log", "summary")
        with ui.element("div").classes("end").props('aria-label="Log" tabindex=0'):
            return text("", "pre")


def last_lines(log: str) -> str:
    """HTML of as much of a log as a page shows."""
    return html.escape("\n".join(log.splitlines()[-_LOG_LINES:]))


def complain(error: object) -> None:
    """Show an error that no field is about."""
    ui.notify(sendable(str(error)), type="negative", multi_line=True, close_button="Close")


def command_html(lines: Sequence[str]) -> str:
    """Command lines that break between words only: a break inside `--` would be misread."""
    return "".join(
        "<span>" + " ".join(f"<b>{html.escape(word)}</b>" for word in line.split(" ")) + "</span>"
        for line in lines
    )


@contextmanager
def shell(panel: Panel, here: str) -> Iterator[None]:
    """Header and main part of a page; `here` is its path."""
    ui.add_css(_CSS)
    dark = ui.dark_mode(_THEMES.get(panel.form.view["theme"]))
    markup("Skip to the content", "a", "skip").props("href=#content")
    with ui.element("header").classes("bar"):
        with ui.element("a").props("href=/").classes("brand"):
            markup(_GLYPH, "span", "glyph")
            text("accum-trainer", "span")
        with ui.element("nav").props('aria-label="Pages"'):
            for path, name in _PAGES:
                link = text(name, "a").props(f"href={path}")
                if path == here:
                    link.props("aria-current=page")
        theme = ui.element("button").props("type=button").classes("theme")
        with theme:
            label = text(_theme_name(panel.form), "span")

    def next_theme() -> None:
        names = list(_THEMES)
        name = names[(names.index(panel.form.view["theme"]) + 1) % len(names)]
        panel.form.set_view("theme", name)
        dark.set_value(_THEMES[name])
        label.set_content(_theme_name(panel.form))

    theme.on("click", next_theme)
    # Before it is connected a page takes in what is typed, and may send it in any order.
    with ui.element("main").props("id=content tabindex=-1 inert") as main:
        yield
    context.client.on_connect(lambda: main.props(remove="inert"))


def _theme_name(form: Form) -> str:
    if form.view["theme"] not in _THEMES:
        form.view["theme"] = "auto"
    return f"Theme: {form.view['theme']}"


class Control:
    """A field on one page: shows the form's value, and passes on what is typed."""

    def __init__(self, form: Form, field: Field, classes: str = "") -> None:
        self._form, self.field = form, field
        name = f"field-{field.name}"
        with ui.element("div").classes(f"field {field.kind} {classes}") as self.element:
            if field.kind != "switch":
                text(field.label, "label").props(f"for={name}")
            self._input = self._made(name)
            self._error = text("", "div", "error").props(f"id={name}-error")
            text(field.help, "div", "tip").props(f"id={name}-help role=tooltip")
        self.show()

    def _made(self, name: str) -> Any:
        field = self.field
        described = f'aria-describedby="{name}-help {name}-error"'
        if field.kind == "switch":
            return ui.switch(field.label, on_change=self._typed).props(f"{described} dense")
        if field.kind == "choice":
            return ui.select(field.choices or {}, value=field.default, on_change=self._typed).props(
                f"for={name} borderless dense options-dense behavior=menu {described}"
            )
        kind = "inputmode=decimal" if field.kind == "number" else ""
        return ui.input(placeholder=field.placeholder, on_change=self._typed).props(
            f"for={name} borderless dense spellcheck=false autocomplete=off {kind} {described}"
        )

    def _typed(self, event: Any) -> None:
        self._form.set(self.field.name, event.value)

    def show(self) -> None:
        """Take over the form's value, which another page may have changed."""
        value = self._form.values[self.field.name]
        if self._input.value != value:
            self._input.set_value(value)

    def show_placeholder(self, words: str) -> None:
        """Show what the empty field stands for."""
        self._input.props["placeholder"] = words
        self._input.update()

    def show_error(self, message: str) -> None:
        """Show what is wrong with the field; "" if nothing is."""
        self._error.set_content(html.escape(message))
        self.element.classes(add="wrong") if message else self.element.classes(remove="wrong")
        if message:
            self._input.props("aria-invalid=true")
        else:
            self._input.props(remove="aria-invalid")
