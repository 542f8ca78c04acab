"""Where option values come from, as plain mappings: a YAML file, the environment, `--set` texts.

Also which options are alternatives of each other. Knows no option's type or limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from accum_trainer.errors import ConfigError

ENVIRONMENT_PREFIX = "ACCUM_TRAINER_"
# Variables with this prefix that are not options of `train`.
OTHER_ENVIRONMENT = {"ACCUM_TRAINER_CACHE"}
# Options that express the same thing in different ways: naming one drops the others if a weaker
# source named them.
_ALTERNATIVES = (
    {"steps", "epochs"},
    {"gradient_accumulation_steps", "global_batch_size"},
    {"batch_size", "max_tokens_per_micro_batch"},
    {"dataset", "dataset_file"},
    {"amp", "mixed_precision"},
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The `option: value` lines of a file.

    Raises:
        ConfigError: the file cannot be read, or does not hold such lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}"
        ) from None
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
