"""The options of `TrainConfig` as options of a command, grouped in `--help` by section.

Values stay text here: `compose` converts them, so a wrong value gives one and the same message from
the command line, the environment and YAML. click's types serve only options that no other source
has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import click

from accum_trainer.cli.file_completion import complete_files, path_option
from accum_trainer.config import OPTIONS, SECTIONS, compose, kind_of, nearest_name, why_needless
from accum_trainer.config.sources import naming_sources
from accum_trainer.errors import ConfigError

_CONFIG = path_option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with these options, underscores for dashes.",
)
_SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set an option by its YAML name; may be repeated.",
)
num_samples_option = click.option(
    "--num-samples",
    type=int,
    metavar="N",
    help="Samples in an epoch, if no --dataset-file is given.",
)


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """The numbers of `16,32,64`.

    Raises:
        ConfigError: `text`, which `option` has, is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option}={text} is no list of samples per update; give whole numbers above 0, such "
            f"as {example}"
        )
    return [int(part) for part in parts]


class OneShownOption(click.Option):
    """Shows the first of its names in `--help`; the others are accepted."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names = self.opts
        try:
            self.opts = names[:1]
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def composed_options(shown: Iterable[str] = OPTIONS) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a command function with the options of `train`, `--config` and `--set`; it is called
    with what they compose to (`Composed`) and with its remaining options.

    Args:
        shown: the options in its `--help`; the others are accepted too.
    """
    listed = set(shown)

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(config_file: str | None, settings: tuple[str, ...] = (), **given: Any) -> Any:
            values = {name: given.pop(name) for name in OPTIONS}
            named = {name: value for name, value in values.items() if value is not None}
            composed = compose(named, settings, config_file, os.environ)
            with naming_sources(composed.sources, lambda: vars(composed.config)):
                return function(composed, **given)

        command: Any = call
        for field in reversed(OPTIONS.values()):
            command = _option(field, hidden=field.name not in listed)(command)
        return _CONFIG(_SET(command))

    return decorate


class _Gigabytes(click.ParamType):
    """A GPU's memory: `80`, `80GB` or `80 G`, converted to the number of GB (10^9 bytes)."""

    name = "GB"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        pattern = r"\s*([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)\s*(?:GB|G)?\s*"
        match = re.fullmatch(pattern, str(value), re.IGNORECASE)
        if match is None:
            raise ConfigError(
                f"gpu_memory={value} is not a size; give the memory of one GPU in GB, such as 80 "
                "or 80GB"
            )
        size = float(match[1])
        if not size > 0 or not math.isfinite(size):
            raise ConfigError(
                f"gpu_memory={value} must be above 0; give the memory of one GPU in GB, such as 80"
            )
        return size


GIGABYTES = _Gigabytes()


def is_on_command_line(name: str) -> bool:
    """Whether the running command was given this option by an argument, not by its environment
    variable or default."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _option(field: dataclasses.Field[Any], hidden: bool) -> Callable[[Any], Any]:
    flag, kind = "--" + field.name.replace("_", "-"), kind_of(field)
    if kind is bool:
        return click.option(
            *(f"{flag}/--no-{flag[2:]}", field.name),
            default=None,
            hidden=hidden,
            help=field.metadata["help"],
        )
    choices = field.metadata.get("choices")
    metavar = "|".join(choices) if choices else {int: "N", float: "X"}.get(kind, "TEXT")
    default = "" if field.default is None else f"  [default: {field.default}]"
    return click.option(
        *(flag, *field.metadata.get("other_flags", ()), field.name),
        cls=OneShownOption,
        default=None,
        shell_complete=_completing(choices, field.metadata.get("may_be_path", False)),
        metavar=metavar,
        hidden=hidden,
        help=field.metadata["help"] + default,
    )


def _completing(choices: Iterable[str] | None, may_be_path: bool) -> Callable[..., Any]:
    """How a shell completes the value of an option: as a file, or to one of its choices."""
    if may_be_path:
        return complete_files

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [choice for choice in choices or () if choice.startswith(incomplete)]

    return complete


class BeforeTrainArguments(click.Command):
    """A command that passes arguments after `--` on to `train`, and says so if an option of `train`
    stands before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            near = nearest_name(error.option_name, OPTIONS, cutoff=0.85)
            if near is None or ctx.resilient_parsing:
                raise
            raise click.UsageError(
                f"No such option '{error.option_name}'. Options of `train` go after `--`: "
                f"-- --{near.replace('_', '-')}",
                ctx,
            ) from None


class SectionedCommand(click.Command):
    """Groups its options by the sections of `TrainConfig`; suggests ours for other trainers' option
    names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if (reason := why_needless(error.option_name)) and not ctx.resilient_parsing:
                raise click.UsageError(f"{error.message} {reason}.", ctx) from None
            flags = {flag for p in self.get_params(ctx) for flag in p.opts}
            near = "--" + (nearest_name(error.option_name, OPTIONS) or "").replace("_", "-")
            if near not in flags:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near}'?", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx)}
        for title, section in SECTIONS.items():
            names = [field.name for field in dataclasses.fields(section)]
            rows = [row for name in names if (row := shown.pop(name, None))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        with formatter.section("Other"):
            formatter.write_dl([row for row in shown.values() if row])
