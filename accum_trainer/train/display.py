"""Show a training while it runs: a live display on a terminal, plain lines elsewhere.

The display never hides the cursor and uses no second screen, so a run that is killed leaves a
usable terminal. What other code prints meanwhile appears above it: Python's standard streams and
the handlers of loggers lead there. Imports rich, no torch; knows records, no engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from accum_trainer.train.progress import Progress, clock_time, progress_line

_TICKS = "▁▂▃▄▅▆▇█"
_LABEL = 10  # columns of a row's name
_REFRESHES_PER_SEC = 4


def has_display() -> bool:
    """Whether standard error is a terminal that a live display can be drawn on."""
    return _has_screen(_Console(stderr=True)) and sys.stderr.isatty()


class _Console(Console):
    """A console that leaves the cursor visible: a process that is killed cannot bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def _has_screen(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def shown_live(
    progress: Progress, batch: str, clipped_at: float | None, stopped_by: Callable[[], str]
) -> Iterator[None]:
    """Show `progress` on the terminal until the context ends; its last state stays there.

    Args:
        batch: the effective batch in words.
        clipped_at: `max_grad_norm`; None for none.
        stopped_by: gives what asked the run to stop ("SIGINT", "time limit"), else "".
    """
    console = _Console(stderr=True)
    is_shared = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    live = (_SharedLive if is_shared else Live)(
        TrainingDisplay(progress, batch, clipped_at, stopped_by),
        console=console,
        refresh_per_second=_REFRESHES_PER_SEC,
        # A file that standard output goes to stays what the program writes there.
        redirect_stdout=sys.stdout.isatty(),
    )
    streams = {stream: name for name in ("stdout", "stderr") if (stream := getattr(sys, name))}
    with live, _handlers_following(streams):
        yield


class _SharedLive(Live):
    """A display on a terminal that other processes write to, such as a traceback of theirs.

    Between two frames the cursor is at the display's top, not at its end. So what they write is
    over the display, and the next frame is drawn below it: nothing of theirs is erased.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        frame = _Frame(self.get_renderable(), is_last=not self.is_started)
        return [_EraseBelow(), *renderables, frame]


class _EraseBelow:
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment("\r\x1b[J", None, [(ControlType.CLEAR,)])


class _Frame:
    def __init__(self, content: RenderableType, is_last: bool) -> None:
        self._content, self._is_last = content, is_last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)[: console.height - 1]
        for line in lines:
            yield from line
            yield Segment.line()
        if not self._is_last:
            yield Control((ControlType.CURSOR_UP, len(lines)))


@contextlib.contextmanager
def _handlers_following(before: dict[Any, str]) -> Iterator[None]:
    """Let handlers of loggers that write to a standard stream of before write to the one of now.

    Args:
        before: streams, and their names in `sys`.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    moved = []
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            stream = getattr(handler, "stream", None)
            with contextlib.suppress(TypeError):  # a stream that has no hash is none of these
                if stream in before and isinstance(handler, logging.StreamHandler):
                    moved.append((handler, stream))
                    handler.setStream(getattr(sys, before[stream]))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


class PlainLines:
    """Lines about a training for a log: every `every` updates, and each window that was skipped or
    ran out of memory, so that they are not missed.

    Args:
        every: updates between two lines; None for about ten lines in all.
        write: takes a line.
    """

    def __init__(self, progress: Progress, every: int | None, write: Callable[[str], None]) -> None:
        self._progress = progress
        self._every = every or max(1, progress.total_updates // 10)
        self._write = write

    def show_last(self) -> None:
        """Write the newest record's line, if one is due."""
        record, last = self._progress.last, self._progress.total_updates
        assert record is not None, "there is no record yet"
        is_due = record["step"] % self._every == 0 or record["step"] == last
        is_news = record["skipped"] or record["oom_splits"] or record.get("eval_loss") is not None
        if is_due or is_news:
            self._write(progress_line(self._progress))


class TrainingDisplay:
    """The live display: rows of facts, each with as many facts to a line as the terminal holds."""

    def __init__(
        self,
        progress: Progress,
        batch: str,
        clipped_at: float | None = None,
        stopped_by: Callable[[], str] = str,
    ) -> None:
        self._progress, self._batch = progress, batch
        self._clipped_at, self._stopped_by = clipped_at, stopped_by

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, draws = options.max_width, not options.ascii_only
        for label, facts in self._rows(width, draws):
            for line in _lines(label, facts, width):
                # Where an ellipsis cannot be written it would be six characters, and the line two.
                line.truncate(width, overflow="ellipsis" if draws else "crop")
                yield line

    def _rows(self, width: int, draws: bool) -> Iterator[tuple[str, list[Text]]]:
        now = self._progress
        yield (
            "update",
            [
                Text(f"{now.done}/{now.total_updates}", "bold"),
                _bar(now.done / max(1, now.total_updates), min(30, max(5, width - 40)), draws),
                *([Text(f"epoch {now.last['epoch']:.2f}")] if now.last is not None else []),
                Text(f"{clock_time(now.seconds_left)} left"),
            ],
        )
        if now.last is not None:
            yield "loss", self._loss(draws)
            yield "step", self._step(now.last)
            yield "tokens/s", self._speed()
            yield "memory", self._device(now.last)
        yield "batch", [*self._split(), *self._noise()]
        if reason := self._stopped_by():
            # A window may take minutes, and a person who typed Ctrl-C wants to know.
            yield "stopping", [Text(f"after this window, and saving ({reason})", "bold yellow")]

    def _loss(self, draws: bool) -> list[Text]:
        now = self._progress
        facts = [Text(f"{now.losses[-1]:.4f}", "bold")] if now.losses else []
        if draws and len(now.losses) > 1:
            facts.append(Text(sparkline([*now.losses][-24:]), "cyan"))
        if (trend := now.trend) is not None:
            styles = {"falling": "green", "rising": "yellow", "level": ""}
            facts.append(Text(trend.describe(), styles[trend.word]))
        if now.last_eval is not None:
            update, loss = now.last_eval
            facts.append(Text(f"evaluation {loss:.4f} after update {update}"))
        return facts or [Text("none yet")]

    def _step(self, record: dict[str, Any]) -> list[Text]:
        facts = [Text(f"lr {record['lr']:.3g}"), Text(f"gradient norm {record['grad_norm']:.3g}")]
        if self._clipped_at:
            is_clipped = record["grad_norm"] > self._clipped_at
            facts[-1].append(f", {'' if is_clipped else 'not '}clipped at {self._clipped_at:g}")
        if self._progress.skipped:
            facts.append(Text(f"{self._progress.skipped} windows skipped", "bold red"))
        if record["oom_splits"]:
            facts.append(Text(f"{record['oom_splits']} split in two (out of memory)", "yellow"))
        return facts

    def _speed(self) -> list[Text]:
        now = self._progress
        useful, computing = now.tokens_per_sec, now.tokens_per_sec_computing
        facts = [
            Text(f"{useful:,.0f} useful"),
            Text(f"{computing:,.0f} without waiting for data"),
            Text(f"padding {now.padding:.1%}"),
        ]
        if (mfu := now.mfu) is not None:
            facts.append(Text(f"MFU {mfu:.1%}"))
        return facts

    def _device(self, record: dict[str, Any]) -> list[Text]:
        return [
            Text(f"{record['memory_gb']:.2f} GB in use"),
            Text(f"{record['peak_gb']:.2f} GB at most"),
        ]

    def _split(self) -> list[Text]:
        split, _, shares = self._batch.partition("; ")
        product, equals, result = split.partition(" = ")
        facts = [product, f"= {result}"] if equals else split.split(", ")
        return [Text(fact) for fact in (*facts, shares) if fact]

    def _noise(self) -> list[Text]:
        if (noise := self._progress.noise_scale) is None:
            return []
        scale, low, high = noise
        interval = f" ({low:.0f} to {high:.0f})" if low is not None and high is not None else ""
        return [Text(f"noise scale {scale:.0f} samples{interval}")]


def _lines(label: str, facts: list[Text], width: int) -> Iterator[Text]:
    """A row: its name and facts, broken between facts; one of them may be too long."""
    indent = _LABEL if width >= 3 * _LABEL else 0
    line = Text(label.ljust(_LABEL) if indent else f"{label} ", "dim", end="", no_wrap=True)
    begun = line.cell_len
    for fact in facts:
        gap = "   " if line.cell_len > begun else ""
        if gap and line.cell_len + len(gap) + fact.cell_len > width:
            yield line
            line, gap = Text(" " * indent), ""
            begun = indent
        line = Text.assemble(line, gap, fact, no_wrap=True)
    yield line


def _bar(share: float, width: int, draws: bool) -> Text:
    filled = round(min(1.0, max(0.0, share)) * width)
    full, empty = ("━", "━") if draws else ("#", "-")
    return Text.assemble((full * filled, "green"), (empty * (width - filled), "bright_black"))


def sparkline(numbers: list[float]) -> str:
    """Numbers as bars of eight heights, from their least to their greatest."""
    low, high = min(numbers), max(numbers)
    steps = len(_TICKS) - 1
    return "".join(
        _TICKS[round((number - low) / (high - low) * steps) if high > low else 0]
        for number in numbers
    )
