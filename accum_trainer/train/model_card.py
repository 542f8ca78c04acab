"""The model card, README.md of a saved model: how it was trained, and how to load it.

Its head is what the hub reads. A card is made to be published: it names files without their
folders, and no secret. Knows a run's configuration and plan; no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accum_trainer.config import TrainConfig
from accum_trainer.train.masking import masked
from accum_trainer.train.model_origin import ModelOrigin

CARD = "README.md"
_LONGEST_VALUE = 300


def model_card(
    config: TrainConfig, plan: Mapping[str, Any], origin: ModelOrigin, is_adapter: bool
) -> str:
    """The card of a run's model.

    Args:
        plan: plan.json; what it does not hold is left out.
        origin: of the weights.
        is_adapter: a LoRA adapter, to be loaded on its base model.
    """
    rows = {
        "base model": _base(config),
        "data": _data(config, plan),
        "effective batch": _batch(plan),
        "optimizer updates": f"{origin.updates:,}, on {origin.num_samples:,} samples",
        "optimizer": _optimizer(config, plan),
        "engine": _joined(plan, engine="", device="on ", mixed_precision="mixed precision: "),
        "LoRA": _lora(config) if config.use_peft else "",
        "seed": str(config.seed),
        "versions": _versions(plan),
    }
    told = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return (
        f"{_head(config, is_adapter)}\n\n# {_title(config, is_adapter)}\n\n"
        "Trained with accum_trainer: the gradient of each update is the mean over the targets of\n"
        "its effective batch, however the batch was cut.\n\n"
        f"| | |\n|---|---|\n{told}\n\n## Use\n\n{_use(config, is_adapter)}"
    )


def merged_card(config: TrainConfig, method: str, parts: Mapping[str, int]) -> str:
    """The card of a merge.

    Args:
        config: of the first part.
        method: `mean`, `concat` or `product` (`runs.average`).
        parts: samples that each part was trained on.
    """
    is_adapter = method == "concat"
    told = "\n".join(f"| {_cell(name)} | {count:,} |" for name, count in parts.items())
    return (
        f"{_head(config, is_adapter)}\n\n# {_title(config, is_adapter)}, merged\n\n"
        f"The mean of {len(parts)} trainings from the same initial weights, each weighted by its "
        "samples.\nMade with accum_trainer (`accum-trainer merge`); `merge.json` has the "
        f"evaluation.\n\n| part | samples |\n|---|---|\n{told}\n\n"
        f"## Use\n\n{_use(config, is_adapter)}"
    )


def _head(config: TrainConfig, is_adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    base = _hub_id(config.model)
    data = _hub_id((config.dataset or "").partition(":")[0])
    tags = ["accum_trainer", *(["lora"] if is_adapter else [])]
    if is_adapter and base is not None:
        tags.append(f"base_model:adapter:{base}")
    head = ModelCardData(
        base_model=base,
        datasets=[data] if data is not None else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{head.to_yaml()}\n---"


def _hub_id(name: str) -> str | None:
    """`name` if it is an id of the hub; None for `tiny`, a folder here, or no such id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name == "tiny" or Path(name).exists() else name


def _title(config: TrainConfig, is_adapter: bool) -> str:
    return f"{'LoRA adapter of' if is_adapter else 'Trained from'} {_name(config.model)}"


def _base(config: TrainConfig) -> str:
    if config.model == "tiny":
        return "`tiny`, a small Llama of random weights that the run made"
    revision = f", revision {_cell(config.revision)}" if config.revision is not None else ""
    return f"`{_name(config.model)}`{revision}"


def _data(config: TrainConfig, plan: Mapping[str, Any]) -> str:
    if config.dataset_file is not None:
        source = f"`{_cell(Path(config.dataset_file).name)}`"
    elif config.dataset is not None:
        source = f"`{_name(config.dataset)}`"
    else:
        source = "the documentation strings of Python's library"
    samples = _count(plan, "num_samples")
    share = f", share {_cell(config.shard)}" if config.shard is not None else ""
    return f"{source}{samples and f', {samples} samples'}{share}"


def _batch(plan: Mapping[str, Any]) -> str:
    size = _count(plan, "effective_batch_size")
    if not size:
        return ""
    tokens = _count(plan, "max_tokens_per_micro_batch")
    largest = f"up to {tokens} tokens" if tokens else _count(plan, "physical_batch_size")
    cut = {
        "micro-batch": largest,
        "accumulation steps": _count(plan, "gradient_accumulation_steps"),
        "processes": _count(plan, "world_size"),
    }
    told = ", ".join(f"{name} {value}" for name, value in cut.items() if value)
    return f"{size} samples per optimizer update ({told})"


def _optimizer(config: TrainConfig, plan: Mapping[str, Any]) -> str:
    told = _joined(plan, lr="peak learning rate ", scheduler="", warmup_updates="warm-up updates: ")
    return f"AdamW, {told}, weight decay {config.weight_decay:g}" if told else "AdamW"


def _lora(config: TrainConfig) -> str:
    told = [
        f"rank {config.lora_r}",
        f"alpha {config.lora_alpha:g}",
        f"dropout {config.lora_dropout:g}",
        f"modules {_cell(config.lora_target_modules or 'all linear layers but the head')}",
    ]
    if config.lora_modules_to_save is not None:
        told.append(f"trained whole: {_cell(config.lora_modules_to_save)}")
    return ", ".join(told)


def _versions(plan: Mapping[str, Any]) -> str:
    versions = plan.get("versions")
    if not isinstance(versions, dict):
        return ""
    return ", ".join(f"{_cell(name)} {_cell(version)}" for name, version in versions.items())


def _use(config: TrainConfig, is_adapter: bool) -> str:
    if not is_adapter:
        return _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_ID")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_ID")',
        )
    if config.model == "tiny":
        return (
            "The base model was made by the run and is not kept. To get a model that loads alone,\n"
            "train with `--merge-adapter`, or merge two runs by `merge --adapter product`.\n"
        )
    base = _hub_id(config.model)
    revision = f', revision="{_cell(config.revision)}"' if config.revision is not None else ""
    named = f'"{base}"{revision}' if base else f'"FOLDER_OF/{_name(config.model)}"'
    return _code(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({named})",
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER_OR_ID")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_ID")',
        "merged = model.merge_and_unload()  # a plain model: the base with the adapter added",
    )


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def _name(path_or_id: str) -> str:
    """A hub's id (with its configuration) whole, of a path the last part."""
    is_id = _hub_id(path_or_id.partition(":")[0]) is not None
    return _cell(path_or_id if is_id else Path(path_or_id).name)


def _count(plan: Mapping[str, Any], key: str) -> str:
    value = plan.get(key)
    return f"{value:,}" if isinstance(value, int) else ""


def _joined(plan: Mapping[str, Any], **before: str) -> str:
    """The plan's values of these names, each after its text; those it does not hold left out."""
    told = {key: plan.get(key) for key in before}
    return ", ".join(
        f"{before[key]}{f'{value:g}' if isinstance(value, float) else _cell(value)}"
        for key, value in told.items()
        if value is not None
    )


def _cell(value: object) -> str:
    """Text that ends neither its cell of a table, nor a code span, nor a string of code."""
    text = re.sub(r"[^\w .,:;+/@=()-]", "_", masked(str(value)))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
