"""Facts about a run from its directory, for a page: plan, configuration, end and events.

A directory may come from anyone, and a page is published: files that are links to elsewhere are not
read, and every value becomes short, printable text. What cannot be read becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from accum_trainer.config import OPTIONS
from accum_trainer.config.sources import read_options
from accum_trainer.errors import AccumTrainerError
from accum_trainer.runs.curve import Curve, printable
from accum_trainer.runs.inside import check_inside
from accum_trainer.runs.json_file import read_json
from accum_trainer.train.run_folder import CONFIG, PLAN, RESULT
from accum_trainer.train.run_lock import LOCK, owner_of

# A plan or a configuration beyond this was not written by a training.
_LARGEST_FILE = 1 << 20
_LONGEST_VALUE = 300
_MOST_EVENTS = 200

Rows = list[tuple[str, str]]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Facts:
    """Facts about a run beside its curve.

    Attributes:
        state: `done`, `stopped by SIGTERM`, `training`, ...; "" for a file of records.
        summary: (title, value) of model, data, batch, engine and versions.
        changed: (option, value) of those that differ from their defaults.
        options: (option, value) of all.
        plan: (key, value) of plan.json.
        events: (step, what happened), in order.
        notes: what could not be read.
    """

    state: str
    summary: Rows = field(default_factory=list)
    changed: Rows = field(default_factory=list)
    options: Rows = field(default_factory=list)
    plan: Rows = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def facts_of(curve: Curve) -> Facts:
    """Read what lies beside a run's records."""
    if curve.folder is None:
        return Facts("", events=_events(curve, {}))
    notes: list[str] = []
    plan = _read(curve.folder / PLAN, read_json, notes)
    result = _read(curve.folder / RESULT, read_json, notes)
    options = _read(curve.folder / CONFIG, read_options, notes)
    defaults = {name: option.default for name, option in OPTIONS.items()}
    return Facts(
        state=_state(curve.folder, result) if plan or result or options else "",
        summary=_summary(plan, curve),
        changed=[
            (shown(name), shown(value))
            for name, value in options.items()
            if name not in defaults or value != defaults[name]
        ],
        options=[(shown(name), shown(value)) for name, value in options.items()],
        plan=list(_flat(plan)),
        events=_events(curve, plan),
        notes=notes,
    )


def _read(path: Path, read: Callable[[Path], dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """The object in a file. Empty if there is none, or if it cannot be read, which is noted."""
    try:
        if not path.exists():
            return {}
        check_inside(path, path.parent, "it is not read")
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            raise AccumTrainerError(f"{path} is no file of a run; it is not read")
        return read(path)
    except (AccumTrainerError, OSError) as error:
        notes.append(shown(error))
        return {}


def shown(value: Any) -> str:
    """An untrusted value as one line of text. A list is shown if it holds no other: it may hold
    itself."""
    if isinstance(value, list) and len(value) < 50 and not any(map(_is_nested, value)):
        text = ", ".join(map(shown, value))
    elif _is_nested(value):
        text = f"a {type(value).__name__}"
    elif isinstance(value, float):
        text = f"{value:g}"
    elif value is None or isinstance(value, bool):
        text = {None: "none", True: "yes", False: "no"}[value]
    else:
        text = printable(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict | set | tuple)


def _flat(plan: dict[str, Any]) -> Any:
    for key, value in plan.items():
        if isinstance(value, dict):
            for inner, one in list(value.items())[:50]:
                yield shown(f"{key}.{inner}"), shown(one)
        else:
            yield shown(key), shown(value)


def _state(folder: Path, result: dict[str, Any]) -> str:
    if result.get("done") is True:
        return "done"
    if result:
        return f"stopped by {shown(result.get('stopped_by') or 'its caller')}"
    if owner_of(folder) is not None:
        return "training"
    return "no sign of life" if (folder / LOCK).exists() else "ended without a result"


def _summary(plan: dict[str, Any], curve: Curve) -> Rows:
    """The lines that a reader looks for first; those that are not known are left out."""

    def of(key: str) -> str:
        return "" if plan.get(key) is None else shown(plan[key])

    def count(key: str) -> str:
        value = plan.get(key)
        return f"{value:,}" if isinstance(value, int) else ""

    versions = plan.get("versions")
    precision = "not mixed" if plan.get("mixed_precision") == "no" else of("mixed_precision")
    rows = [
        ("model", " ".join(filter(None, [of("model"), of("revision")]))),
        ("parameters", _joined(count("trained_parameters"), " trained of ", count("parameters"))),
        ("data", of("data")),
        ("samples", count("num_samples")),
        ("batch", curve.split or of("effective_batch_size")),
        ("updates per epoch", count("updates_per_epoch")),
        ("planned updates", _joined(count("total_updates"), ", warm-up ", count("warmup_updates"))),
        ("learning rate", _joined(of("lr"), ", ", of("scheduler"))),
        ("engine", _joined(of("engine"), " on ", of("device"))),
        ("precision", _joined(precision, ", sums in ", of("accumulation_dtype"))),
        ("gradients exchanged", of("grad_sync")),
        ("layout", of("layout")),
        ("attention", of("attention")),
        ("objective", of("objective")),
        ("seed", of("seed")),
        (
            "versions",
            ", ".join(f"{shown(name)} {shown(value)}" for name, value in versions.items())
            if isinstance(versions, dict)
            else "",
        ),
    ]
    return [(title, value) for title, value in rows if value]


def _joined(first: str, between: str, second: str) -> str:
    return f"{first}{between}{second}" if first and second else first or second


def _events(curve: Curve, plan: dict[str, Any]) -> list[tuple[int, str]]:
    log = curve.log
    events = [
        (step, f"window without an update: {shown(reason) or 'no reason given'}")
        for step, reason in log.skipped
    ]
    splits = log.column("oom_splits")
    if splits is not None:
        events += [
            (int(log.step[place]), f"{splits[place]:.0f} micro-batches split, out of memory")
            for place in np.flatnonzero(splits > 0)[:_MOST_EVENTS].tolist()
        ]
    events += [(step, "the log goes back to this step") for step in log.restarts[:_MOST_EVENTS]]
    for name, title in (("world_size", "processes"), ("physical_batch_size", "B")):
        events += _changes(curve, name, title)
    if plan.get("resumed_from") is not None:
        events.append((int(log.step[0]), f"last continued from {shown(plan['resumed_from'])}"))
    events.sort(key=lambda event: event[0])
    if len(events) > _MOST_EVENTS:
        more = len(events) - _MOST_EVENTS
        events = [*events[:_MOST_EVENTS], (events[_MOST_EVENTS][0], f"and {more:,} more")]
    return events


def _changes(curve: Curve, name: str, title: str) -> list[tuple[int, str]]:
    numbers = curve.log.column(name)
    if numbers is None:
        return []
    places = np.flatnonzero(np.isfinite(numbers))
    known = numbers[places]
    return [
        (int(curve.log.step[places[at]]), f"{title} {known[at - 1]:.0f} becomes {known[at]:.0f}")
        for at in (np.flatnonzero(np.diff(known)) + 1)[:_MOST_EVENTS].tolist()
    ]
