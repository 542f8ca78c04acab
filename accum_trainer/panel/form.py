"""The form of the panel: one text per option, kept in a file and shared by all pages.

The options, their help, choices and limits are those of `TrainConfig`; only the number of
processes, the engine, the unit of length and the run's name are the panel's own. Knows neither
pages nor runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.config import OPTIONS, SECTIONS, kind_of
from accum_trainer.config.engine import ENGINES

logger = logging.getLogger(__name__)

# The choices of K; `train` takes any other.
ACCUMULATION_STEPS = (1, 2, 4, 8, 16, 32)
# The panel's own controls. No option can have such a name: options are names of Python.
PROCESSES, ENGINE, RUN_NAME = "panel-processes", "panel-engine", "panel-run-name"
LENGTH, UNIT = "panel-length", "panel-unit"
SAME = ""  # the choice that leaves an option at its default
# Options that other controls of the panel decide, or that make no run to watch.
_DECIDED = {
    *("steps", "epochs", "engine", "zero_stage", "output_dir", "global_batch_size"),
    *("resume", "dry_run"),
    *("max_tokens_per_micro_batch", "rank_weights", "shard", "amp"),
}
_LABELS = {
    "batch_size": "Batch size",
    "gradient_accumulation_steps": "Accumulation steps",
    "lr": "Learning rate",
    "lr_scaling": "Scaling of the rate",
    "lr_base_batch_size": "Batch the rate was found at",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lora_target_modules": "Adapted modules",
    "lora_modules_to_save": "Modules trained whole",
    "use_peft": "Train LoRA adapters",
    "max_seq_len": "Longest sample (tokens)",
    "mixed_precision": "Precision",
    "max_grad_norm": "Clip the gradient at",
    "warmup": "Warm-up",
    "dataset": "Dataset on the hub",
    "dataset_file": "Data file",
    "cpu": "On the CPU",
    "cpu_offload": "Sharded state on the host",
    "parallel_independent": "Independent runs side by side",
    "cuda_ids": "GPUs, or slots of the CPU",
    "vary": "What differs between them",
    "max_restarts": "Restarts after a crash",
}
# In place of sentences about options that the panel does not have.
_HELP = {
    "batch_size": "B, the micro-batch: samples in one forward and backward on one process. Memory "
    "grows with it.",
    "gradient_accumulation_steps": "K, micro-batches per update on one process. Memory does not "
    "grow with it.",
    "parallel_independent": "Several complete trainings at once, one on each device. They exchange "
    "no gradient: each trains on its own share of the samples, and the results can be merged; or "
    "each on all of them with settings of its own.",
    "cuda_ids": "A device for each run, such as 0,1. On the CPU they are names of slots, which "
    "share the cores.",
}
# Shown in an empty field.
_PLACEHOLDERS = {
    "dataset_file": "Text that comes with Python, or rows.jsonl, .csv, .parquet, …",
    "lora_target_modules": "all linear layers",
    "cuda_ids": "all GPUs",
    "vary": "shares of the samples, or lr=1e-4,3e-4",
}


@dataclass(frozen=True)
class Field:
    """One control.

    Attributes:
        kind: `text`, `number`, `choice` or `switch`.
        help: the sentences of its tooltip.
        default: what it begins with; a text, or a bool of a switch.
        choices: value -> label of a `choice`.
    """

    name: str
    label: str
    kind: str
    help: str
    default: str | bool = ""
    choices: dict[str, str] | None = None
    placeholder: str = ""


def _of_option(name: str) -> Field:
    option = OPTIONS[name]
    label = _LABELS.get(name, name.replace("_", " ").capitalize())
    kind, text = kind_of(option), _HELP.get(name, str(option.metadata["help"]))
    if kind is bool:
        return Field(name, label, "switch", text, bool(option.default))
    default = "" if option.default is None else f"{option.default}"
    choices = option.metadata.get("choices")
    if choices:
        unset = {SAME: "Default"} if option.default is None else {}
        labels = unset | {choice: choice for choice in choices}
        return Field(name, label, "choice", text, default, labels)
    kind_of_text = "number" if kind in (int, float) else "text"
    return Field(name, label, kind_of_text, text, default, None, _PLACEHOLDERS.get(name, default))


_ENGINE_LABELS = {
    "ddp": "DDP, or one process",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1 (optimizer)",
    "zero2": "ZeRO-2 (+ gradients)",
    "zero3": "ZeRO-3 (+ weights)",
}
_OWN = (
    Field(
        PROCESSES,
        "Processes",
        "number",
        "W, processes that share the gradient: one per GPU. The effective batch grows with them.",
        "1",
    ),
    Field(
        ENGINE,
        "Engine",
        "choice",
        "What is split over the processes: nothing (DDP), or optimizer state, gradients and "
        "weights. The update is the same; memory and traffic differ.",
        "ddp",
        {name: _ENGINE_LABELS.get(name, name) for name in ENGINES if name != "single"},
    ),
    Field(
        RUN_NAME,
        "Name of the run",
        "text",
        "Its folder among the runs. Empty: named after the model and the effective batch.",
    ),
    Field(LENGTH, "Train for", "number", "How long to train.", "1"),
    Field(
        UNIT,
        "Unit",
        "choice",
        "Epochs are passes over the data; updates are optimizer steps, each over one effective "
        "batch.",
        "epochs",
        {"epochs": "epochs", "steps": "updates"},
    ),
)
OWN = tuple(field.name for field in _OWN)
FIELDS: dict[str, Field] = {field.name: field for field in _OWN} | {
    name: _of_option(name) for name in OPTIONS if name not in _DECIDED
}
# The values of a new form: the batch is shown as numbers, not left to defaults.
_FIRST = {name: field.default for name, field in FIELDS.items()} | {
    "batch_size": "4",
    "gradient_accumulation_steps": "1",
}
# On the page one after another; all others follow by section, folded.
DATA = ("model", "max_seq_len", "dataset_file")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
MEMORY = ("mixed_precision", "gradient_checkpointing", "cpu_offload", "cpu")
RATE = ("lr", "warmup", "scheduler")
INDEPENDENT = ("cuda_ids", "max_restarts", "vary")
# Switch -> the fields that it shows. They keep what was typed while they are hidden, unused.
NESTED = {"use_peft": LORA, "parallel_independent": INDEPENDENT}
_SHOWN = {
    *("batch_size", "gradient_accumulation_steps"),
    *(*DATA, *MEMORY, *RATE),
    *(*NESTED, *LORA, *INDEPENDENT),
}


def other_fields() -> dict[str, list[Field]]:
    """Section title -> its fields that the page does not place itself."""
    found = {
        title: [
            FIELDS[name]
            for name in section.__dataclass_fields__
            if name in FIELDS and name not in _SHOWN
        ]
        for title, section in SECTIONS.items()
    }
    return {title: fields for title, fields in found.items() if fields}


def k_help(steps: int) -> str:
    """The tooltip of one choice of K."""
    if steps == 1:
        return "Each micro-batch is an update: nothing is accumulated."
    cost = "Memory does not grow with it."
    if steps >= 8:
        cost += " Updates become few: change K or the learning rate, not both at once."
    return f"{steps} micro-batches of each process make one update. {cost}"


class Form:
    """The typed `values`: field name -> text (bool of a switch).

    Args:
        file: keeps the values; read now, and written with each change.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._listeners: list[Callable[[str], None]] = []
        self.values: dict[str, str | bool] = dict(_FIRST)
        self.view: dict[str, Any] = {"theme": "auto", "log_axis": False, "smoothing": 0.6}
        self._load()

    def set(self, name: str, value: str | bool | None) -> None:
        """Take over one value, keep all of them, and tell every page."""
        value = "" if value is None else value
        if self.values[name] == value:
            return
        self.values[name] = value
        self.save()
        for listener in list(self._listeners):
            listener(name)

    def set_view(self, name: str, value: Any) -> None:
        """Keep a setting of how things are shown."""
        if self.view.get(name) != value:
            self.view[name] = value
            self.save()

    def reset(self) -> None:
        """Back to the defaults."""
        for name, value in _FIRST.items():
            self.set(name, value)

    def on_change(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the name of each changed field; returns how to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def changed(self) -> None:
        """Tell every page that what the values mean may have changed."""
        for listener in list(self._listeners):
            listener("")

    def save(self) -> None:
        """Write the file. If that fails, a warning says so, and the panel goes on."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            state = {"values": self.values, "view": self.view}
            # Whole or not at all, without waiting for the disk: this is at each key.
            partial = self._file.with_name(f"{self._file.name}.partial")
            partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._file)
        except OSError as error:
            logger.warning("the panel's state could not be kept in %s (%s)", self._file, error)

    def _load(self) -> None:
        """Take over what the file has of the right kind; an option of another version is left
        out."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
            values, view = state["values"], state["view"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            logger.warning("%s is damaged; the panel begins with the defaults", self._file)
            return
        for kept, found in ((self.values, values), (self.view, view)):
            with contextlib.suppress(AttributeError):
                for name, value in found.items():
                    if name in kept and type(value) is type(kept[name]):
                        kept[name] = value
        for name, field in FIELDS.items():
            if field.choices and self.values[name] not in field.choices:
                self.values[name] = field.default
