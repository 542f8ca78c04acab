"""The page Set up: what to train, the batch and its plan, the command, and the start."""

from __future__ import annotations

import html
from urllib.parse import quote

from nicegui import context, ui

from accum_trainer.errors import AccumTrainerError
from accum_trainer.launch.quoting import words as quoted
from accum_trainer.panel.form import (
    ACCUMULATION_STEPS,
    DATA,
    ENGINE,
    FIELDS,
    LENGTH,
    MEMORY,
    NESTED,
    PROCESSES,
    RATE,
    RUN_NAME,
    UNIT,
    k_help,
    other_fields,
)
from accum_trainer.panel.memory_table import memory_table
from accum_trainer.panel.preview import Preview, preview
from accum_trainer.panel.processes import start
from accum_trainer.panel.proof import PROOF, Verdict, verdict_of
from accum_trainer.panel.shell import (
    Control,
    Panel,
    button,
    command_html,
    complain,
    enable,
    markup,
    shell,
    text,
)

_K = "gradient_accumulation_steps"
# Most cells of the drawn window.
_MOST_ROWS = 8
_REFRESH_SEC = 2.0
_PROOF_JOB = "proof"


class SetupPage:
    """One open page; all pages show one form."""

    def __init__(self, panel: Panel) -> None:
        self._panel, self._form = panel, panel.form
        self._controls: dict[str, Control] = {}
        self._nested: dict[str, ui.element] = {}
        self._not_started = ""  # why the last start was refused
        self._is_left = False  # for the run that it started
        with shell(panel, "/"):
            text("Set up a training", "h1", "sr")
            self._batch_scaling()
            with ui.element("div").classes("columns"):
                with ui.element("div").classes("sheet"):
                    self._fields()
                with ui.element("section").classes("plan").props('aria-label="Plan"'):
                    self._plan()
        self._show()
        context.client.on_delete(self._form.on_change(self._changed))
        context.client.on_connect(self._connected)
        ui.timer(_REFRESH_SEC, self._show)  # files and runs change meanwhile

    def _control(self, name: str, classes: str = "") -> Control:
        control = self._controls[name] = Control(self._form, FIELDS[name], classes)
        return control

    def _batch_scaling(self) -> None:
        with ui.element("section").classes("scaling").props('aria-labelledby="scaling"'):
            text("Batch Scaling", "h2").props("id=scaling")
            with ui.element("div").classes("equation"):
                self._control("batch_size")
                text("×", "span", "times")
                self._accumulation_steps()
                text("×", "span", "times")
                self._control(PROCESSES)
                text("=", "span", "times")
                self._effective = markup("", "output", "effective").props("aria-live=polite")
            self._window = markup("", "div", "window").props("aria-hidden=true")

    def _accumulation_steps(self) -> None:
        field = FIELDS[_K]
        with ui.element("div").classes("field steps"):
            text(field.label, "span", "label").props("id=steps-label")
            self._steps = {}
            with (
                ui.element("div")
                .classes("choices")
                .props("role=radiogroup aria-labelledby=steps-label aria-describedby=steps-help")
            ):
                for steps in ACCUMULATION_STEPS:
                    with ui.element("label"):
                        choice = ui.element("input").props(
                            f"type=radio name=steps value={steps} aria-label={steps} "
                            f"aria-describedby=steps-{steps}-help"
                        )
                        choice.on("change", lambda steps=steps: self._form.set(_K, f"{steps}"), [])
                        self._steps[f"{steps}"] = choice
                        text(f"{steps}", "span")
                        text(k_help(steps), "div", "tip").props(
                            f"id=steps-{steps}-help role=tooltip"
                        )
            text(field.help, "div", "sr").props("id=steps-help")

    def _fields(self) -> None:
        with _group("Model and data"):
            for name, width in zip(DATA, ("wide", "", "full"), strict=True):
                self._control(name, width)
        with _group("Engine and memory"):
            self._control(ENGINE)
            for name in MEMORY:
                self._control(name)
            self._with_nested("use_peft")
        with _group("Learning"):
            for name in (*RATE, LENGTH, UNIT):
                self._control(name)
        with _group("Several runs"):
            self._with_nested("parallel_independent")
        with ui.element("details").classes("group"):
            text("All other options", "summary")
            for title, fields in other_fields().items():
                text(title, "h3")
                with ui.element("div").classes("fields"):
                    for field in fields:
                        self._control(field.name)

    def _with_nested(self, switch: str) -> None:
        """A switch and the fields that it shows."""
        self._control(switch, "full" if switch == "parallel_independent" else "")
        with ui.element("div").classes("nested") as self._nested[switch]:
            for name in NESTED[switch]:
                self._control(name, "wide" if name == "vary" else "")

    def _plan(self) -> None:
        self._control(RUN_NAME)
        self._wrong = text("", "div", "alert").props("role=alert")
        self._figures = markup("", "dl", "figures")
        self._warnings = markup("", "ul", "warnings")
        with ui.element("div").classes("actions"):
            self._start = ui.element("button").props("type=button").classes("primary")
            with self._start:
                self._start_label = text("Start training", "span")
            self._start.on("click", self._pressed_start, [])
            button("Reset", self._form.reset)
        with ui.element("div").classes("head"):
            text("Command", "h3")
            button("Copy", self._copy, "small")
        self._command = text("", "pre", "command").props('aria-label="Command" tabindex=0')
        with ui.element("details"):
            text("YAML for --config", "summary")
            self._yaml = text("", "pre", "yaml").props('aria-label="YAML" tabindex=0')
        with ui.element("details"):
            text("Memory per engine", "summary")
            button("Estimate", self._estimate, "small")
            self._memory = markup("", "div", "memory").props("role=status")
        self._proof()

    def _proof(self) -> None:
        with ui.element("details").props("open" if self._panel.jobs.of(_PROOF_JOB) else ""):
            text("Proof", "summary")
            text(
                "Runs some updates of this configuration, and compares each with one big batch in "
                "float64. Trains nothing.",
                "p",
                "soft",
            )
            self._proof_line = text("", "pre", "command").props(
                'aria-label="Proof command" tabindex=0'
            )
            with ui.element("div").classes("actions"):
                self._prove = button("Prove it", self._pressed_prove)
                self._stop_proof = button("Stop", self._pressed_stop_proof)
            self._verdict = markup("", "div", "verdict").props('role=status aria-label="Verdict"')

    def _changed(self, name: str) -> None:
        self._not_started = ""
        if name in self._controls:
            self._controls[name].show()
        self._show()

    def _preview(self) -> Preview:
        return preview(self._form.values, self._panel.runs, self._panel.rows)

    def _show(self) -> None:
        shown = self._shown = self._preview()
        number = "–" if shown.effective is None else f"{shown.effective:,}"
        self._effective.set_content(f"Effective Batch: <b>{number}</b>")
        self._window.set_content(_drawn(shown.sizes))
        for steps, choice in self._steps.items():
            if steps == self._form.values[_K]:
                choice.props("checked")
            else:
                choice.props(remove="checked")
        for switch, fields in self._nested.items():
            fields.set_visibility(bool(self._form.values[switch]))
        for name, control in self._controls.items():
            control.show_error(shown.error if shown.at == name else "")
        self._wrong.set_content(html.escape(shown.error or self._not_started))
        self._controls[RUN_NAME].show_placeholder(shown.folder.name if shown.folder else "")
        self._figures.set_content(
            "".join(
                f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
                for name, value in shown.figures
            )
        )
        self._warnings.set_content(
            "".join(f"<li>{html.escape(warning)}</li>" for warning in shown.warnings)
        )
        command = shown.command
        self._command.set_content(command_html(command.lines) if command else "–")
        self._yaml.set_content(html.escape(command.yaml) if command else "–")
        self._start_label.set_content("Continue training" if shown.continues else "Start training")
        enable(self._start, command is not None)
        self._show_proof(shown)

    def _show_proof(self, shown: Preview) -> None:
        job = self._panel.jobs.of(_PROOF_JOB)
        is_running = job is not None and job.is_running
        line = quoted(shown.proof) if shown.proof else ""
        self._proof_line.set_content(command_html([line]) if line else "–")
        enable(self._prove, bool(line) and not is_running)
        self._stop_proof.set_visibility(is_running)
        if job is None:
            said = ""
        elif job.is_running:
            said = "<p>Comparing: the reference is computed in float64 on the CPU …</p>"
        else:
            said = _verdict_html(verdict_of(job, self._panel.runs / PROOF))
        if job is not None and job.line != line:
            said += f"<p>This was for another configuration:</p><pre>{html.escape(job.line)}</pre>"
        self._verdict.set_content(said)

    def _pressed_prove(self) -> None:
        shown, job = self._preview(), self._panel.jobs.of(_PROOF_JOB)
        if shown.proof is not None and (job is None or not job.is_running):
            try:
                (self._panel.runs / PROOF).unlink(missing_ok=True)  # an earlier verdict is none
                self._panel.jobs.start(_PROOF_JOB, shown.proof)
            except OSError as error:
                complain(f"the proof cannot be started: {error.strerror or error}")
        self._form.changed()  # on other pages too

    def _pressed_stop_proof(self) -> None:
        job = self._panel.jobs.of(_PROOF_JOB)
        if job is not None:
            job.stop()

    def _connected(self) -> None:
        self._is_left = False  # also one that the browser goes back to

    def _pressed_start(self) -> None:
        if self._is_left:  # the second click of two; without a name it would be another run
            return
        shown = self._preview()
        if shown.command is None or shown.folder is None:
            self._show()
            return
        try:
            start(shown.command, shown.folder)
        except AccumTrainerError as error:
            self._not_started = str(error)
            self._show()
            return
        self._is_left = True
        self._form.changed()  # on other pages too: the name is taken
        ui.navigate.to(f"/watch?run={quote(shown.folder.name)}")

    def _copy(self) -> None:
        if self._shown.command is not None:
            ui.clipboard.write("\n".join(self._shown.command.lines))
            ui.notify("Copied", position="bottom", timeout=1500)

    async def _estimate(self) -> None:
        shown = self._shown
        if shown.config is None or shown.sizes is None:
            self._memory.set_content("First mend what is wrong above.")
            return
        self._memory.set_content("Estimating: the model's shapes are traced on no device …")
        engine = str(self._form.values[ENGINE])
        found = await memory_table(shown.config, shown.sizes[2], engine)
        if not self._memory.is_deleted:
            self._memory.set_content(found)


class _group:
    """A titled group of fields."""

    def __init__(self, title: str) -> None:
        with ui.element("section").classes("group"):
            text(title, "h2")
            self._fields = ui.element("div").classes("fields")

    def __enter__(self) -> None:
        self._fields.__enter__()

    def __exit__(self, *error: object) -> None:
        self._fields.__exit__(*error)


def _verdict_html(verdict: Verdict) -> str:
    if verdict.passed is None:
        return f'<p class="chip none">no verdict</p><pre>{html.escape(verdict.message)}</pre>'
    name = "PASS" if verdict.passed else "FAIL"
    said = [f'<p class="chip {name}">{name}</p>', f"<p>{html.escape(verdict.engine)}</p>"]
    if verdict.largest is not None:
        largest = verdict.largest
        said.append(
            f"<p>Largest error <b>{largest.error:.1e}</b>, at most {largest.tolerance:.1e} "
            f"({html.escape(largest.name)})</p>"
        )
    rows = "".join(
        f'<tr class="{html.escape(check.result)}"><td>{html.escape(check.name)}</td>'
        f"<td>{html.escape(check.result)}</td><td>{_exponent(check.error)}</td>"
        f"<td>{_exponent(check.tolerance)}</td></tr>"
        for check in verdict.checks
        if check.error is not None or check.result == "FAIL"
    )
    said.append(
        '<div class="scroll" tabindex=0><table><thead><tr><th scope=col>check</th><th scope=col>'
        "result</th><th scope=col>error</th><th scope=col>at most</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
    for check in verdict.checks:
        if check.result == "FAIL":
            lines = "\n".join([check.meaning, *check.details])
            said.append(f"<h3>{html.escape(check.name)}</h3><pre>{html.escape(lines)}</pre>")
    return "".join(said)


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _drawn(sizes: tuple[int, int, int] | None) -> str:
    """The window as blocks, a row per process and a block per micro-batch, and their update."""
    if sizes is None:
        return ""
    batch, steps, processes = sizes
    drawn_steps = min(steps, max(ACCUMULATION_STEPS))
    rows = []
    for row in range(min(processes, _MOST_ROWS)):
        cells = f"<i>{batch if drawn_steps <= 8 else ''}</i>" * drawn_steps
        name = f"<span>process {row}</span>" if processes > 1 else ""
        rows.append(f"<div>{name}{cells}</div>")
    more = f"<p>and {processes - _MOST_ROWS} more processes</p>" if processes > _MOST_ROWS else ""
    size = "small" if drawn_steps > 8 else ""
    total = f"{batch * steps * processes:,}"
    return (
        f'<div class="rows {size}" style="--steps:{drawn_steps}">{"".join(rows)}{more}</div>'
        f'<div class="update"><span>one update over {total} samples</span></div>'
    )
