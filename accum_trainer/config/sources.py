"""Where option values come from, as plain mappings: a YAML file, the environment, `--set` texts.

Also which options are alternatives of each other. Knows no option's type or limits.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from accum_trainer.errors import ConfigError, DataError, first_line

ENVIRONMENT_PREFIX = "ACCUM_TRAINER_"
# Variables with this prefix that are not options of `train`.
OTHER_ENVIRONMENT = {"ACCUM_TRAINER_CACHE", "ACCUM_TRAINER_PANEL_PASSWORD"}
# Options that express the same thing in different ways: naming one drops the others if a weaker
# source named them.
_ALTERNATIVES = (
    {"steps", "epochs"},
    {"gradient_accumulation_steps", "global_batch_size"},
    {"batch_size", "max_tokens_per_micro_batch"},
    {"dataset", "dataset_file"},
    {"amp", "mixed_precision"},
    {"engine", "zero_stage"},
)


class _Loader(yaml.SafeLoader):
    """Says where a value cannot be made, and refuses two values of one name, of which YAML's
    parser keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"{key.value} has two values; give it once"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # a date without such a day, !!int of a word: any type
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:60]!r} is no {kind} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def read_yaml(path: str | Path, what: str = "configuration") -> Any:
    """Read a YAML file, whatever it holds.

    Args:
        what: the file is, for the message if it cannot be read.

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the {what} {path}: {reason}") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line} is not YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read: its values are nested too deeply") from None


def read_options(path: str | Path) -> dict[str, Any]:
    """The `option: value` lines of a file.

    Raises:
        ConfigError: the file cannot be read, or does not hold such lines.
    """
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not `option: value` lines")
    return values


def read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Options among the variables: ACCUM_TRAINER_BATCH_SIZE is `batch_size`."""
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_ENVIRONMENT
    }


def merge_settings(command_line: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`command_line` with the `key=value` texts of `--set` added.

    Raises:
        ConfigError: a text without `=`, or an option with two values.
    """
    merged = dict(command_line)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ConfigError(f"--set {setting} is not key=value")
        if key in merged and str(merged[key]) != text:
            raise ConfigError(
                f"{key} is given twice on the command line: {merged[key]} and --set {setting}; "
                "give it once"
            )
        merged[key] = text
    return merged


COMMAND_LINE = "command line"
# Options whose value is a file, by which messages about it name it.
_FILES = ("dataset_file", "eval_file", "chat_template")


@contextlib.contextmanager
def naming_sources(
    sources: Mapping[str, str], values: Callable[[], Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Put the sources of the options that a ConfigError or DataError names before its message,
    unless all are the command line. A message that names no option but a data file is about the
    option that gives that file.

    Args:
        sources: option -> its source.
        values: option -> its value, if known.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        said = str(error)
        named = [
            source
            for name, source in sources.items()
            if re.search(rf"(?<![\w/.-])(?:micro_)?{name}=", said)  # also micro_batch_size
        ]
        if not named and values is not None:
            known = values()
            files = {name: known.get(name) for name in _FILES if name in sources}
            named = [
                sources[name]
                for name, file in files.items()
                if file and re.search(rf"(?<![\w/.-]){re.escape(str(file))}(?![\w/-])", said)
            ]
        if not set(named) - {COMMAND_LINE}:
            raise
        kind = type(error)
        raise kind(f"{' and '.join(dict.fromkeys(named))}: {error}") from None


def displaced(values: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Options in `given`, from weaker sources, of which `values` names an alternative. A null names
    nothing."""
    named = {key for key, value in values.items() if value is not None}
    return [
        key
        for group in _ALTERNATIVES
        if named & group
        for key in group
        if key in given and key not in values
    ]
