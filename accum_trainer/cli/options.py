"""Options of the command line made from the fields of `TrainConfig`, grouped in `--help` as they
are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import click

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig, kind_of, nearest_key, sections
from accum_trainer.data.counting import count_rows
from accum_trainer.errors import ConfigError


def config_options(names: Iterable[str] | None = None) -> Callable[[Any], Any]:
    """Decorate a command with the options of `TrainConfig`, or with those named.

    Values arrive as they were typed and None where they were not: `compose` converts them, so that
    a wrong value gets the same message from the command line, the environment and YAML.
    """

    def decorate(command: Any) -> Any:
        for field in reversed(dataclasses.fields(TrainConfig)):
            if names is None or field.name in names:
                command = _option(field)(command)
        return command

    return decorate


def source_options(command: Any) -> Any:
    """Decorate a command with the other places options come from: `--config FILE` and `--set
    KEY=VALUE`."""
    setting = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set an option by its YAML name; may be repeated.",
    )
    file = click.option(
        "--config",
        "config_file",
        metavar="FILE",
        help="YAML with these options, underscores for dashes.",
    )
    return file(setting(command))


def _option(field: dataclasses.Field[Any]) -> Callable[[Any], Any]:
    flag, kind = "--" + field.name.replace("_", "-"), kind_of(field)
    if kind is bool:
        return click.option(
            f"{flag}/--no-{flag[2:]}", field.name, default=None, help=field.metadata["help"]
        )
    choices = field.metadata.get("choices")
    metavar = "|".join(choices) if choices else {int: "N", float: "X"}.get(kind, "TEXT")
    default = "" if field.default is None else f"  [default: {field.default}]"
    return click.option(
        flag, field.name, default=None, metavar=metavar, help=field.metadata["help"] + default
    )


def sized_plan(config: TrainConfig, processes: int, num_samples: int | None) -> BatchPlan:
    """The batch plan of `config` on so many processes, with the number of samples where it is given
    or a file says it.

    Raises:
        ConfigError: sizes that do not fit, or the number of samples said twice.
    """
    if num_samples is not None and config.dataset_file is not None:
        raise ConfigError(
            f"num_samples={num_samples} and dataset_file={config.dataset_file} both say how much "
            "data there is; give one"
        )
    if config.dataset_file is not None:
        num_samples = count_rows(config.dataset_file)
    if isinstance(config.batch_size, str):
        raise ConfigError(
            f"batch_size={config.batch_size} is found on the device when training starts; give a "
            "number to plan with"
        )
    return BatchPlan(
        config.batch_size,
        config.gradient_accumulation_steps,
        processes,
        config.global_batch_size,
        num_samples,
    )


class SectionedCommand(click.Command):
    """Shows the options under the sections of `TrainConfig`, and knows what other trainers call
    them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = {flag for p in self.get_params(ctx) for flag in p.opts}
            near = "--" + (nearest_key(error.option_name) or "").replace("_", "-")
            if near not in flags:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near}'?", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx)}
        for section, fields in sections():
            rows = [row for field in fields if (row := shown.pop(field.name, None))]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)
        with formatter.section("Other"):
            formatter.write_dl([row for row in shown.values() if row])
