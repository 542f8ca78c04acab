"""The configuration of a training run: one frozen dataclass, and where its values come from.

Each field of `TrainConfig` is one option of `train`: `--batch-size` on the command line,
`batch_size` in YAML, `ACCUM_TRAINER_BATCH_SIZE` in the environment. The field carries its help,
section and limits, and everything else (the command line's options, the written YAML, the error
messages) is derived from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accum_trainer.batch_plan import (
    LR_SCALINGS,
    SCHEDULES,
    parse_rank_weights,
    parse_shard,
    parse_warmup,
    positive_int,
)
from accum_trainer.errors import ConfigError

ENVIRONMENT_PREFIX = "ACCUM_TRAINER_"
# Options that say the same thing in two ways: naming one of them drops the others that a weaker
# source named.
_ALTERNATIVES = (
    {"steps", "epochs"},
    {"gradient_accumulation_steps", "global_batch_size"},
    {"batch_size", "max_tokens_per_micro_batch"},
    {"dataset", "dataset_file"},
    {"amp", "mixed_precision"},
)
# What transformers.Trainer and its scripts call these options; no spelling would lead there.
_ELSEWHERE = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "scheduler",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "attn_implementation": "attention",
    "torch_compile": "compile",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "train_file": "dataset_file",
    "validation_file": "eval_file",
}
# Variables of this prefix that are not options of `train`.
OTHER_ENVIRONMENT = {"ACCUM_TRAINER_CACHE"}


def _option(default: Any, section: str, help: str, **limits: Any) -> Any:
    """A dataclass field that is an option: `choices`, `minimum`, `above` limit it, `needs` says
    what is missing for it, `only_with` names the option without which it has no effect."""
    return dataclasses.field(default=default, metadata={"section": section, "help": help, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. Sizes are in samples, `steps` and cadences in
    optimizer updates.

    Raises:
        ConfigError: a value of the wrong kind or outside its limits, or options that exclude each
            other.
    """

    batch_size: int | str | None = _option(
        None,
        "Batch",
        "B, the micro-batch: most samples in one forward/backward on one process; auto finds the "
        "largest micro-batch that "
        "fits the device. Default: 4, or what --max-tokens-per-micro-batch allows.",
        minimum=1,
        word="auto",
    )
    max_tokens_per_micro_batch: int | None = _option(
        None,
        "Batch",
        "Most tokens in one forward/backward, padding counted, instead of B: short samples share a "
        "micro-batch. Needs "
        "--global-batch-size.",
        minimum=1,
    )
    gradient_accumulation_steps: int | None = _option(
        None,
        "Batch",
        "K, micro-batches per update on one process. Default: 1, or what --global-batch-size "
        "needs.",
        minimum=1,
    )
    global_batch_size: int | None = _option(
        None,
        "Batch",
        "B_eff, samples per optimizer update over all processes; K follows from it.",
        minimum=1,
    )
    grad_sync: str = _option(
        "auto",
        "Batch",
        "When processes exchange gradients. Same update, different traffic and memory.",
        choices=("auto", "once-per-window", "every-microbatch"),
    )
    accumulation_dtype: str = _option(
        "float32",
        "Batch",
        "The dtype that gradients accumulate in.",
        choices=("float32", "bfloat16"),
    )
    rank_weights: str | None = _option(
        None,
        "Batch",
        "Shares of the window per process, such as 2,1 for a GPU twice as fast as the other; auto "
        "measures them.",
    )
    layout: str = _option(
        "auto",
        "Batch",
        "How samples lie in a micro-batch: padded to a rectangle, or packed end to end; auto packs "
        "for flash and flex attention.",
        choices=("auto", "padded", "packed"),
    )
    recover_from_oom: str = _option(
        "auto",
        "Batch",
        "Cut a micro-batch that runs out of memory in two and run it again; always: also a "
        "window's last one, by "
        "exchanging gradients after its backward.",
        choices=("auto", "always", "never"),
    )
    loss_on_targets: str = _option(
        "auto",
        "Batch",
        "Make logits only where there are targets; off makes them everywhere, as the model by "
        "itself does.",
        choices=("auto", "off"),
    )
    router_loss: str = _option(
        "auto",
        "Batch",
        "Add the load-balancing loss of a mixture of experts; auto: if its configuration has a "
        "coefficient above 0.",
        choices=("auto", "off"),
    )
    pad_to_multiple_of: int | None = _option(
        None,
        "Batch",
        "Round padded lengths up to a multiple. Default: 8 on a GPU, 1 on a CPU.",
        minimum=1,
    )

    steps: int | None = _option(
        None, "Length", "Optimizer updates to make. Instead of --epochs.", minimum=1
    )
    epochs: int | None = _option(
        None, "Length", "Passes over the data. Default: 1 where --steps is not given.", minimum=1
    )
    max_hours: float | None = _option(
        None, "Length", "Stop in order, saved, before this many hours have passed.", above=0
    )

    model: str = _option(
        "tiny", "Model", "A path, a hub id, or `tiny`, a small Llama that needs no download."
    )
    max_seq_len: int = _option(512, "Model", "Most tokens in one sample.", minimum=2)
    mixed_precision: str | None = _option(
        None,
        "Model",
        "Autocast dtype of the forward pass. Default: what the launcher says, else no.",
        choices=("no", "bf16", "fp16"),
    )
    amp: bool = _option(
        False, "Model", "Mixed precision in the best dtype of this device (bf16, else fp16)."
    )
    gradient_checkpointing: bool = _option(
        False, "Model", "Recompute activations in the backward: less memory, more time."
    )
    attention: str | None = _option(
        None,
        "Model",
        "transformers' attention implementation, such as sdpa, eager or flash_attention_2. "
        "Default: the model's own choice.",
    )
    compile: bool = _option(
        False,
        "Model",
        "Compile the model's blocks with torch.compile, once for all lengths of samples.",
    )
    use_peft: bool = _option(False, "Model", "Train LoRA adapters instead of the whole model.")
    lora_r: int = _option(
        16, "Model", "Rank of the LoRA adapters.", minimum=1, only_with="use_peft"
    )
    lora_alpha: float = _option(
        32.0,
        "Model",
        "LoRA scale: adapters act with lora_alpha / lora_r.",
        above=0,
        only_with="use_peft",
    )
    lora_dropout: float = _option(
        0.0,
        "Model",
        "Dropout before the adapters, 0 to below 1.",
        minimum=0,
        below=1,
        only_with="use_peft",
    )
    lora_target_modules: str | None = _option(
        None,
        "Model",
        "Modules to adapt, such as q_proj,v_proj. Default: all linear layers but the output head.",
        only_with="use_peft",
    )

    lora_modules_to_save: str | None = _option(
        None,
        "Model",
        "Modules to train whole beside the adapters and save with them, such as lm_head.",
        only_with="use_peft",
    )
    merge_adapter: bool = _option(
        False,
        "Model",
        "With --use-peft, also write the base model with the adapter merged in, to model-merged/.",
    )

    dataset_file: str | None = _option(
        None,
        "Data",
        "Training rows: .txt .jsonl .json .csv .parquet. Default: the embedded corpus.",
    )
    dataset: str | None = _option(None, "Data", "Training rows from the hub: an id, or id:config.")
    prompt_column: str | None = _option(
        None,
        "Data",
        "The column that is the prompt, with --completion-column; also of the evaluation rows.",
    )
    completion_column: str | None = _option(
        None, "Data", "The column that is trained on, with --prompt-column."
    )
    text_column: str | None = _option(
        None, "Data", "The column of texts that are trained on whole."
    )
    chat_template: str | None = _option(
        None,
        "Data",
        "A Jinja file: the chat template of messages and conversations, in place of the "
        "tokenizer's.",
    )
    eval_file: str | None = _option(
        None, "Data", "Rows for evaluation, in the same formats; at the end, or with --eval-every."
    )
    eval_every: int | None = _option(
        None, "Data", "Evaluate every so many updates (and at the end).", minimum=1
    )

    lr: float = _option(3e-4, "Optimisation", "Peak learning rate, before --lr-scaling.", above=0)
    lr_scaling: str = _option(
        "none",
        "Optimisation",
        "Scale --lr from --lr-base-batch-size to the effective batch.",
        choices=LR_SCALINGS,
    )
    lr_base_batch_size: int | None = _option(
        None,
        "Optimisation",
        "The effective batch at which --lr was found.",
        minimum=1,
        only_with="lr_scaling",
    )
    scheduler: str = _option(
        "cosine", "Optimisation", "Shape of the learning rate over updates.", choices=SCHEDULES
    )
    warmup: str = _option(
        "0", "Optimisation", "Warm-up: 100 (updates), 5% (of the run) or 0.5ep (epochs)."
    )
    max_grad_norm: float | None = _option(
        1.0,
        "Optimisation",
        "Clip the averaged gradient to this norm once per update; `none` for no clipping.",
        above=0,
    )
    weight_decay: float = _option(
        0.0, "Optimisation", "AdamW weight decay, on matrices only.", minimum=0
    )
    seed: int = _option(
        0, "Optimisation", "Seed of weights, order of samples and dropout.", minimum=0
    )

    cpu: bool = _option(False, "Engine", "Train on the CPU even where there is a GPU.")
    zero_stage: str = _option(
        "none",
        "Engine",
        "Shard optimizer, gradients or weights with DeepSpeed ZeRO.",
        choices=("none", "zero1", "zero2", "zero3"),
    )
    cpu_offload: bool = _option(False, "Engine", "Keep ZeRO's optimizer state in host memory.")

    parallel_independent: bool = _option(
        False,
        "Independent runs",
        "Several complete trainings side by side, one on each of --cuda-ids: each on its own share "
        "of the samples, or "
        "with its own --vary.",
    )
    cuda_ids: str | None = _option(
        None,
        "Independent runs",
        "Devices of --parallel-independent, such as 0,1; on a CPU, names of slots.",
    )
    vary: str | None = _option(
        None,
        "Independent runs",
        "What differs between the runs, which then all see all samples: lr=1e-4,3e-4; several with "
        "`;` give all combinations.",
    )
    max_restarts: int = _option(
        3,
        "Independent runs",
        "How often one run that crashed is restarted from its checkpoint.",
        minimum=0,
        only_with="parallel_independent",
    )
    shard: str | None = _option(
        None,
        "Independent runs",
        "Train on a share I/N: every N-th sample of the global order, from the I-th (0 to N-1).",
    )

    output_dir: str | None = _option(
        None, "Output", "The run directory. Default: runs/<model>-<date>-<time>."
    )
    log_file: str | None = _option(
        None, "Output", "A second place for the records, besides metrics.jsonl."
    )
    report_to: str = _option(
        "none", "Output", "Also send records to a tracker.", needs="experiment trackers"
    )
    checkpoint_every: int = _option(
        500, "Output", "Updates between checkpoints (one is always written at the end).", minimum=1
    )
    keep_checkpoints: int = _option(2, "Output", "Newest checkpoints to keep.", minimum=1)
    resume: str = _option(
        "auto",
        "Output",
        "auto: continue what the run directory holds; never; or a checkpoint's PATH.",
    )
    save_dtype: str = _option(
        "auto",
        "Output",
        "The dtype of the weights in model/. auto: that of the model's own checkpoint, or float32 "
        "for a --shard, "
        "which is to be merged. Checkpoints of the run are float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    dry_run: bool = _option(
        False, "Output", "Check everything, print the plan, train nothing, write nothing."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.max_tokens_per_micro_batch is not None:
            if self.batch_size is not None:
                raise ConfigError(
                    f"batch_size={self.batch_size} and "
                    f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} both say "
                    "how large a micro-batch may be; give one of them"
                )
            if self.global_batch_size is None or self.gradient_accumulation_steps is not None:
                raise ConfigError(
                    f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} makes as many "
                    "micro-batches as the samples "
                    "need; give global_batch_size, and leave gradient_accumulation_steps out"
                )
            if self.max_tokens_per_micro_batch < self.max_seq_len:
                raise ConfigError(
                    f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} is below "
                    f"max_seq_len={self.max_seq_len}, so "
                    "that a long sample fits no micro-batch; raise the one or lower the other"
                )
        elif self.batch_size == "auto" and (
            self.global_batch_size is None or self.gradient_accumulation_steps is not None
        ):
            raise ConfigError(
                "batch_size=auto makes as many micro-batches as the device needs; give "
                "global_batch_size, and leave "
                "gradient_accumulation_steps out"
            )
        elif self.batch_size is None:
            object.__setattr__(self, "batch_size", 4)
        if self.gradient_accumulation_steps is None and self.global_batch_size is None:
            object.__setattr__(self, "gradient_accumulation_steps", 1)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps={self.steps} and epochs={self.epochs} both say how long to train; give one "
                "of them"
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1)
        if self.dataset_file is not None and self.dataset is not None:
            raise ConfigError(
                f"dataset_file={self.dataset_file} and dataset={self.dataset} both name the "
                "training data; give one of them"
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ConfigError(
                f"prompt_column={self.prompt_column} and "
                f"completion_column={self.completion_column} belong together; "
                "give both (or text_column, for texts that are trained on whole)"
            )
        if self.prompt_column is not None and self.text_column is not None:
            raise ConfigError(
                f"prompt_column={self.prompt_column} and text_column={self.text_column} both say "
                "what is trained on; "
                "give one of them"
            )
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise ConfigError(
                f"prompt_column and completion_column are both {self.prompt_column}; give two "
                "columns"
            )
        named = [n for n in ("prompt_column", "text_column") if getattr(self, n) is not None]
        if named and not (self.dataset_file or self.dataset or self.eval_file):
            raise ConfigError(
                f"{named[0]}={getattr(self, named[0])} has no effect without data of yours; give "
                "dataset_file or dataset "
                f"too, or leave {named[0]} out"
            )
        if self.amp and self.mixed_precision is not None:
            raise ConfigError(
                f"amp picks the precision, but mixed_precision={self.mixed_precision} is given "
                "too; leave one of them out"
            )
        if self.lr_scaling != "none" and self.lr_base_batch_size is None:
            raise ConfigError(
                f"lr_scaling={self.lr_scaling} needs lr_base_batch_size, the effective batch at "
                f"which lr={self.lr:g} was found"
            )
        if (
            self.eval_every is not None
            and self.eval_file is None
            and (self.dataset_file or self.dataset)
        ):
            raise ConfigError(
                f"eval_every={self.eval_every} needs eval_file, the rows to evaluate on "
                "(only the embedded corpus holds rows back by itself)"
            )
        if self.merge_adapter and not self.use_peft:
            raise ConfigError(
                "merge_adapter merges a LoRA adapter into its base model; give use_peft too"
            )
        if self.cpu_offload and self.zero_stage == "none":
            raise ConfigError(
                "cpu_offload keeps ZeRO's optimizer state in host memory; give zero_stage (zero1 "
                "to zero3) too"
            )
        if self.layout == "packed" and self.pad_to_multiple_of is not None:
            raise ConfigError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect with layout=packed, "
                "which pads nothing; "
                "leave one of them out"
            )
        self._refuse_without_effect()
        parse_warmup(self.warmup)
        parse_shard(self.shard)
        parse_rank_weights(self.rank_weights)
        for name in ("cuda_ids", "vary"):
            if getattr(self, name) is not None and not self.parallel_independent:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is for independent runs; give "
                    "parallel_independent too, or leave it out"
                )
        if self.parallel_independent and self.shard is not None:
            raise ConfigError(
                f"shard={self.shard} is one share, and parallel_independent trains them all; give "
                "one of them"
            )

    def _refuse_without_effect(self) -> None:
        """Refuse an option that says something which another option keeps from being in force.

        By value: an option at its default says nothing, so that a written configuration can be
        read.
        """
        for field in dataclasses.fields(self):
            other, value = field.metadata.get("only_with"), getattr(self, field.name)
            if (
                other is None
                or value == field.default
                or getattr(self, other) not in (False, "none")
            ):
                continue
            raise ConfigError(
                f"{field.name}={value} has an effect only with {other}, and {other} is "
                f"{_shown(getattr(self, other))}; "
                f"give {other} too, or leave {field.name} out"
            )

    def without_peft(self) -> TrainConfig:
        """The same configuration without adapters, and without the options that shape them."""
        values: dict[str, Any] = {"use_peft": False, "merge_adapter": False}
        values |= {
            f.name: f.default
            for f in dataclasses.fields(self)
            if f.metadata.get("only_with") == "use_peft"
        }
        return dataclasses.replace(self, **values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read a configuration from a YAML file, defaults for what it leaves out."""
        return compose(config_file=path).config

    def varied(self, settings: Sequence[str]) -> TrainConfig:
        """The same configuration with some `key=value` settings in place of its own.

        Raises:
            ConfigError: an unknown key or a bad value.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changes = _merge_settings({}, settings)
        for key in changes:
            known_key(key, "vary")
        values = {name: getattr(self, name) for name in defaults}
        for key in _displaced(changes, values):
            values[key] = defaults[key]
        return TrainConfig(**(values | changes))

    def to_yaml(self) -> str:
        """The whole configuration as YAML, by section, every default included; `from_yaml` reads it
        back."""
        lines = [
            "# Every option of this run. `accum-trainer train --config THIS_FILE --output-dir NEW` "
            "repeats it."
        ]
        for section, fields in sections():
            lines.append(f"\n# {section}")
            values = {field.name: getattr(self, field.name) for field in fields}
            lines.append(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())
        return "\n".join(lines) + "\n"


def sections() -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """The options of `train` in order, grouped: ("Batch", [fields]), ("Length", [fields]), ..."""
    grouped: dict[str, list[dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(TrainConfig):
        grouped.setdefault(field.metadata["section"], []).append(field)
    yield from grouped.items()


def kind_of(field: dataclasses.Field[Any]) -> type:
    """The type of an option's value: int, float, bool or str; `int | None` is int."""
    hint = typing.get_type_hints(TrainConfig)[field.name]
    return (
        next(t for t in typing.get_args(hint) if t is not types.NoneType)
        if typing.get_args(hint)
        else hint
    )


@dataclass(frozen=True)
class Composed:
    """A configuration and what lost on the way: `overridden` holds one line for each value that
    another source beat."""

    config: TrainConfig
    overridden: list[str]


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
            or one option given two values on the command line.
    """
    given: dict[str, tuple[Any, str]] = {}
    overridden = []
    for source, values in (
        (str(config_file), _read_yaml(config_file) if config_file is not None else {}),
        ("environment", _read_environment(environment or {})),
        ("command line", _merge_settings(command_line or {}, settings)),
    ):
        for key in values:
            known_key(key, source)
        for key in _displaced(values, given):
            value, weaker = given.pop(key)
            if value is not None:
                overridden.append(
                    f"{key}={value} ({weaker}) is dropped for what the {source} says instead"
                )
        for key, value in values.items():
            if key in given and given[key][0] != value:
                overridden.append(
                    f"{key}={value} ({source}) over {given[key][0]} ({given[key][1]})"
                )
            given[key] = (value, source)
    return Composed(TrainConfig(**{key: value for key, (value, _) in given.items()}), overridden)


def _displaced(values: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Options of weaker sources whose alternative `values` names (and means: a null names
    nothing)."""
    named = {key for key, value in values.items() if value is not None}
    return [
        key
        for group in _ALTERNATIVES
        if named & group
        for key in group
        if key in given and key not in values
    ]


def known_key(key: str, source: str) -> None:
    """Raise a ConfigError that suggests the nearest option when `key` is none."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if key in names:
        return
    near = nearest_key(key)
    hint = f"did you mean {near}?" if near else "`accum-trainer train --help` lists the options"
    raise ConfigError(f"{source}: unknown option {key!r}; {hint}")


def nearest_key(key: str) -> str | None:
    """The option that somebody who wrote `key` (with dashes or underscores) most likely meant."""
    name = str(key).lstrip("-").replace("-", "_")
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {_reason(error)}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not `option: value` lines")
    return values


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_ENVIRONMENT
    }


def _merge_settings(command_line: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
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


_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (lambda text: int(text), "an integer"),
    float: (lambda text: float(text), "a number"),
    bool: (
        lambda text: {
            "true": True,
            "yes": True,
            "1": True,
            "false": False,
            "no": False,
            "0": False,
        }[text.lower()],
        "true or false",
    ),
    str: (str, "text"),
}


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert text to the option's type and hold it to its limits, or raise a ConfigError that
    names it."""
    kind = kind_of(field)
    optional = type(None) in typing.get_args(typing.get_type_hints(TrainConfig)[field.name])
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
            raise ConfigError(f"{field.name}={value!r} is not {wanted}{_example(field)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and not isinstance(value, str):
        value = _as_text(field, value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{field.name}={value!r} is not {wanted}{_example(field)}")
    _check_limits(field, value)
    return value


def _shown(value: Any) -> str:
    return "off" if value is False else str(value)


def _as_text(field: dataclasses.Field[Any], value: Any) -> str:
    """YAML reads `warmup: 100` as a number and `mixed_precision: no` as false; both were meant as
    written."""
    if value is False and "no" in field.metadata.get("choices", ()):
        return "no"
    if isinstance(value, (list, tuple)) and all(
        isinstance(item, (str, int, float)) for item in value
    ):
        return ",".join(str(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{field.name}={value!r} is not text{_example(field)}")


def _example(field: dataclasses.Field[Any]) -> str:
    limits = field.metadata
    if "minimum" in limits and kind_of(field) is int:
        return f"; give a whole number of at least {limits['minimum']}"
    return f"; give one of {', '.join(limits['choices'])}" if "choices" in limits else ""


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    name, limits = field.name, field.metadata
    if "choices" in limits and value not in limits["choices"]:
        near = difflib.get_close_matches(value, limits["choices"], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"{name}={value} is not known; give one of {', '.join(limits['choices'])}{hint}"
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
    if "needs" in limits and value != field.default:
        raise ConfigError(
            f"{name}={value} needs {limits['needs']}, which this version of accum_trainer does not "
            "have; "
            f"leave {name} at {field.default}"
        )
