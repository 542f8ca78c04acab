"""`TrainConfig`: every section in one flat, frozen dataclass, and its YAML form.

Sections are bases, not fields, because option names are flat everywhere (`config.batch_size`, YAML,
command line) and one option is called `model`, as a section would be. A function that needs one
section only may take `BatchOptions`, say, and be given the whole configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accum_trainer.config.batch import BatchOptions
from accum_trainer.config.data import DataOptions
from accum_trainer.config.engine import EngineOptions, IndependentOptions
from accum_trainer.config.model import ModelOptions
from accum_trainer.config.names import check_names
from accum_trainer.config.optimisation import LengthOptions, OptimisationOptions
from accum_trainer.config.option import Field, Section
from accum_trainer.config.output import OutputOptions
from accum_trainer.config.sources import (
    displaced,
    merge_settings,
    naming_sources,
    read_options,
)
from accum_trainer.errors import ConfigError

# In the order of `--help` and of a written configuration.
SECTIONS: dict[str, type[Section]] = {
    "Batch": BatchOptions,
    "Length": LengthOptions,
    "Model": ModelOptions,
    "Data": DataOptions,
    "Optimisation": OptimisationOptions,
    "Engine": EngineOptions,
    "Independent runs": IndependentOptions,
    "Output": OutputOptions,
}


@dataclass(frozen=True)
class TrainConfig(  # bases from last section to first: dataclasses collect fields in that order
    OutputOptions,
    IndependentOptions,
    EngineOptions,
    OptimisationOptions,
    DataOptions,
    ModelOptions,
    LengthOptions,
    BatchOptions,
):
    """Everything that decides a training run. Sizes are in samples; `steps` and intervals are in
    optimizer updates.

    Raises:
        ConfigError: a value of the wrong type or outside its limits, or options that exclude each
            other.
    """

    def _check_rules(self) -> None:
        super()._check_rules()
        most = self.max_tokens_per_micro_batch
        if most is not None and most < self.max_seq_len:
            raise ConfigError(
                f"max_tokens_per_micro_batch={most} is below max_seq_len={self.max_seq_len}, so "
                "a long sample fits no micro-batch; raise the former or lower the latter"
            )
        if self.parallel_independent and self.engine in ("ddp", "fsdp2"):
            raise ConfigError(
                f"engine={self.engine} shares a gradient between processes, and each of the "
                "parallel_independent runs is one process; leave engine out"
            )
        if self.keep_best and self.eval_every is None and self.eval_file is None:
            data = self.dataset_file or self.dataset
            raise ConfigError(
                "keep_best=true compares evaluations, and this run makes none; give eval_every"
                f"{', and eval_file with the rows to evaluate on,' if data else ''} or leave "
                "keep_best out"
            )

    def without_peft(self) -> TrainConfig:
        """The same configuration without adapters and the options that shape them."""
        values: dict[str, Any] = {"use_peft": False, "merge_adapter": False}
        values |= {
            name: field.default
            for name, field in OPTIONS.items()
            if field.metadata.get("only_with") == "use_peft"
        }
        return dataclasses.replace(self, **values)

    def of_folder(self, model: Path) -> TrainConfig:
        """The same configuration for a model in a folder, which has no revisions."""
        return dataclasses.replace(self, model=str(model), revision=None)

    @classmethod
    def from_yaml(cls, path: str | Path, *, trust_remote_code: bool | None = None) -> TrainConfig:
        """Read a configuration from a YAML file; missing options keep their defaults.

        Args:
            trust_remote_code: in place of what the file says.

        Raises:
            ConfigError: an unreadable file, an unknown option or a bad value; or the file wants to
                run a model's code, which only its reader can allow.
        """
        values = read_options(path)
        check_names(values, OPTIONS, str(path))
        if trust_remote_code is not None:
            values["trust_remote_code"] = trust_remote_code
        with naming_sources(dict.fromkeys(values, str(path))):
            config = cls(**values)
        if trust_remote_code is None:
            check_not_from_file(config, values, str(path))
        return config

    def alone(self) -> TrainConfig:
        """The configuration of one of the independent runs, without its share or variation."""
        return dataclasses.replace(
            self,
            parallel_independent=False,
            cuda_ids=None,
            vary=None,
            max_restarts=TrainConfig.max_restarts,
        )

    def varied(self, settings: Sequence[str]) -> TrainConfig:
        """The same configuration with some `key=value` settings replaced.

        Raises:
            ConfigError: an unknown option or a bad value.
        """
        changes = merge_settings({}, settings)
        check_names(changes, OPTIONS, "vary")
        values = {name: getattr(self, name) for name in OPTIONS}
        for name in displaced(changes, values):
            values[name] = OPTIONS[name].default
        return TrainConfig(**(values | changes))

    def to_yaml(self) -> str:
        """The whole configuration as YAML, by section and with every default; `from_yaml` reads it
        back."""
        lines = [
            "# Every option of this run. `accum-trainer train --config THIS_FILE --output-dir NEW` "
            "repeats it."
        ]
        for title, section in SECTIONS.items():
            values = {
                field.name: getattr(self, field.name) for field in dataclasses.fields(section)
            }
            lines.append(f"\n# {title}")
            lines.append(_dumped(values).rstrip())
        return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Quotes the line breaks of Unicode, which YAML would fold to blanks when it reads them."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if {"\x85", "\u2028", "\u2029"} & set(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _dumped(values: dict[str, Any]) -> str:
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def check_not_from_file(config: TrainConfig, names: Iterable[str], file: str) -> None:
    """Raise a ConfigError if one of the options `names`, which `file` sets, is not for files."""
    for name in names:
        field, value = OPTIONS[name], getattr(config, name)
        if field.metadata.get("not_from_files") and value != field.default:
            raise ConfigError(
                f"{name}={str(value).lower()} in {file}: a file cannot allow this, because it may "
                f"come from others; look at the model's code, then give --{name.replace('_', '-')} "
                "on the command line"
            )


# Every option by name, in the order of `SECTIONS`.
OPTIONS: dict[str, Field] = {field.name: field for field in dataclasses.fields(TrainConfig)}
