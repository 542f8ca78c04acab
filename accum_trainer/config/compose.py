"""Compose a configuration from its sources: command line over environment over YAML over
defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.config.names import check_names
from accum_trainer.config.sources import (
    COMMAND_LINE,
    displaced,
    merge_settings,
    naming_sources,
    read_environment,
    read_options,
)
from accum_trainer.config.train_config import OPTIONS, TrainConfig, check_not_from_file


@dataclass(frozen=True)
class Composed:
    """A configuration and the values that lost.

    Attributes:
        overridden: one line for each value that a stronger source replaced or dropped.
        sources: option -> where its value was written, for those that are not at their default.
    """

    config: TrainConfig
    overridden: list[str]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


def compose(
    command_line: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    config_file: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Composed:
    """Compose a configuration: command line over environment over YAML over defaults.

    Args:
        command_line: option name to value, for the options that were given.
        settings: `key=value` texts of `--set`, which count as command line.
        config_file: a YAML file of options.
        environment: variables; those that start with ACCUM_TRAINER_ are options.

    Raises:
        ConfigError: an unknown key (with the nearest known one), an unreadable file, a bad value,
            one option given two values on the command line, or one that a file may not set.
    """
    given: dict[str, tuple[Any, str]] = {}
    overridden = []
    for source, values in (
        (str(config_file), read_options(config_file) if config_file is not None else {}),
        ("environment", read_environment(environment or {})),
        (COMMAND_LINE, merge_settings(command_line or {}, settings)),
    ):
        check_names(values, OPTIONS, source)
        for key in displaced(values, given):
            value, weaker = given.pop(key)
            if value is not None:
                overridden.append(
                    f"{key}={value} ({weaker}) is dropped; the {source} gives an alternative"
                )
        for key, value in values.items():
            if key in given and given[key][0] != value:
                overridden.append(
                    f"{key}={value} ({source}) over {given[key][0]} ({given[key][1]})"
                )
            given[key] = (value, source)
    sources = {key: source for key, (_, source) in given.items()}
    with naming_sources(sources):
        config = TrainConfig(**{key: value for key, (value, _) in given.items()})
    in_file = [key for key, (_, source) in given.items() if source == str(config_file)]
    check_not_from_file(config, in_file, str(config_file))
    return Composed(config, overridden, sources)
