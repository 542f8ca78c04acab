"""Names of options that users write: suggestions for unknown ones, and names other trainers use."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from accum_trainer.errors import ConfigError

# Names in transformers.Trainer, TRL and Lightning that are too far from ours to match by spelling.
_TRAINER_NAMES = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "gradient_clip_val": "max_grad_norm",
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
    "precision": "mixed_precision",
    "torch_dtype": "mixed_precision",
    "packing": "layout",
    "group_by_length": "layout",
    "deepspeed": "engine",
    "fsdp": "engine",
    "strategy": "engine",
    "use_cpu": "cpu",
    "no_cuda": "cpu",
    "data_seed": "seed",
    "torch_compile": "compile",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "evaluation_strategy": "eval_every",
    "do_eval": "eval_every",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "keep_best",
    "save_steps": "checkpoint_every",
    "save_strategy": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "resume",
    "logging_dir": "log_file",
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "train_file": "dataset_file",
    "validation_file": "eval_file",
}


_READS_AHEAD = (
    "Leave it out: rows are tokenised before training, on all cores, and a thread makes the next "
    "window while one is trained on; data_wait_sec in the records is the time that training waits"
)
# Options of other trainers that have no counterpart because there is nothing to set.
_NEEDLESS = {
    "num_workers": _READS_AHEAD,
    "dataloader_num_workers": _READS_AHEAD,
    "dataloader_prefetch_factor": _READS_AHEAD,
    "dataloader_pin_memory": _READS_AHEAD,
    "dataset_num_proc": _READS_AHEAD,
    "preprocessing_num_workers": _READS_AHEAD,
}


def why_needless(written: str) -> str:
    """Why there is no option like `written` (with dashes or underscores); "" if there might be."""
    return _NEEDLESS.get(str(written).lstrip("-").replace("-", "_"), "")


def nearest_name(written: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The option among `names` that `written` (with dashes or underscores) most likely means; None
    if none is as near as `cutoff` (1 is the same)."""
    name = str(written).lstrip("-").replace("-", "_")
    if name in _TRAINER_NAMES:
        return _TRAINER_NAMES[name]
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def check_names(written: Iterable[str], names: Collection[str], source: str) -> None:
    """Raise a ConfigError that suggests the nearest option if one of `written` is not in `names`.

    Args:
        source: where they were written, for the message.
    """
    for name in written:
        if name in names:
            continue
        near = nearest_name(name, names)
        if reason := why_needless(name):
            raise ConfigError(f"{source}: unknown option {name!r}. {reason}")
        hint = f"did you mean {near}?" if near else "`accum-trainer train --help` lists the options"
        raise ConfigError(f"{source}: unknown option {name!r}; {hint}")
