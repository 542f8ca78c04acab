"""Options and sections of options: types, limits, and the check of one value.

An option is a dataclass field made by `option`; a `Section` is a frozen dataclass of options that
validates itself. Knows neither the sections nor where values come from.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accum_trainer.batch_plan import positive_int
from accum_trainer.errors import ConfigError

Field = dataclasses.Field[Any]


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        help: its line in `--help`.
        limits: `choices`, `minimum`, `above` and `below` bound the value; `aliases` maps other
            spellings of choices to them; `word` is a text that is accepted beside numbers;
            `only_with` names the option without which this one has no effect; with
            `not_from_files`, a file that came from others cannot set it; `other_flags` are accepted
            on the command line too, and not shown in `--help`; with `may_be_path`, a shell
            completes the value as a file.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Section:
    """Options that belong together. Subclasses add rules between options in `_check_rules`.

    Modules that define sections do not import `annotations` from `__future__`: `kind_of` reads the
    fields' types.

    Raises:
        ConfigError: a value of the wrong type or outside its limits, or options that exclude each
            other.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._set(field.name, checked_value(field, getattr(self, field.name)))
        self._check_rules()
        self._check_effect()

    def _set(self, name: str, value: Any) -> None:
        """Replace a value while the frozen object is being made."""
        object.__setattr__(self, name, value)

    def _check_rules(self) -> None:
        """Raise a ConfigError if options contradict each other; fill in defaults that depend on
        others. Overrides call `super()` first, so the rules of composed sections run in order."""

    def _check_effect(self) -> None:
        """Raise a ConfigError for an option that another one renders ineffective.

        Compares values: an option at its default is never refused, so a written configuration,
        which lists every option, can be read back.
        """
        for field in dataclasses.fields(self):
            other, value = field.metadata.get("only_with"), getattr(self, field.name)
            if (
                other is None
                or value == field.default
                or getattr(self, other) not in (False, "none")
            ):
                continue
            state = "off" if getattr(self, other) is False else getattr(self, other)
            raise ConfigError(
                f"{field.name}={value} has an effect only with {other}, and {other} is {state}; "
                f"give {other} too, or leave {field.name} out"
            )


def kind_of(field: Field) -> type:
    """The type of an option's value: int, float, bool or str; int for `int | None`."""
    kinds = [kind for kind in typing.get_args(field.type) if kind is not types.NoneType]
    return kinds[0] if kinds else typing.cast(type, field.type)


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (lambda text: _BOOLEANS[text.lower()], "true or false"),
    str: (str, "text"),
}


def checked_value(field: Field, value: Any) -> Any:
    """Convert text to the option's type and check its limits.

    Raises:
        ConfigError: a wrong type or a value outside the limits; the message names the option.
    """
    kind = kind_of(field)
    optional = types.NoneType in typing.get_args(field.type)
    if optional and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        return None
    if value is not None and value == field.metadata.get("word"):
        return value
    parse, wanted = _PARSERS[kind]
    if isinstance(value, str) and kind is not str:
        try:
            value = parse(value.strip())
        except (ValueError, KeyError):
            raise ConfigError(
                f"{field.name}={shown(value)} is not {wanted}{_example(field)}"
            ) from None
    if _is_long(value):
        raise ConfigError(f"{field.name}={shown(value)} is beyond 64 bits{_example(field)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and not isinstance(value, str):
        value = _as_text(field, value)
    if kind is str:
        value = field.metadata.get("aliases", {}).get(value, value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{field.name}={shown(value)} is not {wanted}{_example(field)}")
    _check_limits(field, value)
    return value


def _as_text(field: Field, value: Any) -> str:
    """Undo YAML's typing of text: it reads `warmup: 100` as a number, `mixed_precision: no` as
    false."""
    if value is False and "no" in field.metadata.get("choices", ()):
        return "no"
    if isinstance(value, (list, tuple)) and all(
        isinstance(item, (str, int, float)) and not _is_long(item) for item in value
    ):
        return ",".join(str(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{field.name}={shown(value)} is not text{_example(field)}")


def _is_long(item: Any) -> bool:
    return isinstance(item, int) and abs(item) >= 1 << 63


def shown(value: Any) -> str:
    """A value in a message: `repr`, and no more of it than a line holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python writes
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else f"{text[:96]}..."


def _example(field: Field) -> str:
    limits = field.metadata
    if "minimum" in limits and kind_of(field) is int:
        return f"; give a whole number of at least {limits['minimum']}"
    return f"; give one of {', '.join(limits['choices'])}" if "choices" in limits else ""


def _check_limits(field: Field, value: Any) -> None:
    name, limits = field.name, field.metadata
    if "choices" in limits and value not in limits["choices"]:
        near = difflib.get_close_matches(value[:100], limits["choices"], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"{name}={value[:100]} is not known; give one of {', '.join(limits['choices'])}{hint}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not a finite number")
    if limits.get("minimum") == 1:
        positive_int(name, value)
    if "minimum" in limits and value < limits["minimum"]:
        raise ConfigError(
            f"{name}={value} is below {limits['minimum']}; give at least {limits['minimum']}"
        )
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(f"{name}={value:g} must be above {limits['above']}")
    if "below" in limits and value >= limits["below"]:
        raise ConfigError(f"{name}={value:g} must be below {limits['below']}")
