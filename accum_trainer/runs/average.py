"""The weighted mean of models: tensor by tensor, and of LoRA adapters by their products.

Model i counts n_i of N = sum n_i. Sums are float64 and are rounded once, to each tensor's dtype.

    mean      X = sum_i n_i X_i / N
    concat    A = [A_1; ...; A_n]   B = [c_1 B_1, ..., c_n B_n]   c_i = n_i s_i / (N s_1)
              so that s_1 B A = sum_i n_i/N s_i B_i A_i, the mean of the products
    product   W = W_base + sum_i n_i/N s_i B_i A_i

An adapter acts as W + s B A. The mean of the A and of the B is none of these: mean(B) mean(A) has
cross terms B_i A_j that nobody trained. Knows saved models and how much each counts; nothing of
runs.

PEFT's `add_weighted_adapter(combination_type="cat")` gives the same product (a test compares them),
but not in its place here: it needs the base model and all adapters in memory, refuses
`modules_to_save`, writes float32 for 16-bit adapters, and is wrong by the factor sqrt(rank) if the
first adapter uses rsLoRA (peft 0.21).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.runs.saved_model import ADAPTER, ADAPTER_CONFIG, SavedModel
from accum_trainer.train.model_card import CARD
from accum_trainer.train.model_origin import NOTE

# Weights are written anew, and where they come from is in merge.json and the merge's own card.
_NOT_COPIED = shutil.ignore_patterns("*.safetensors", NOTE, CARD)
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# LoRA options that leave the product B A and its scale alone, or that are taken into account here.
# Any other must be at its default.
_FOLLOWED = {
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "target_modules",
        "exclude_modules",
    ),
    *(
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "inference_mode",
        "task_type",
        "auto_mapping",
    ),
    *(
        "base_model_name_or_path",
        "revision",
        "peft_type",
        "peft_version",
        "ensure_weight_tying",
        "init_lora_weights",
    ),
}


def average_models(models: Sequence[SavedModel], counts: Sequence[int], folder: Path) -> list[str]:
    """Write the mean of whole models to a new `folder`, with the first one's other files; returns
    notes for the user.

    Memory: one file of the result and one tensor of each model. Tensors that are not floating point
    are copied from the first model.
    """
    shutil.copytree(models[0].folder, folder, ignore=_NOT_COPIED)
    notes: list[str] = []
    for file, names in models[0].layout.items():
        tensors = {name: _mean(name, models, counts, notes) for name in names}
        save_file(tensors, folder / file, metadata=models[0].metadata(file))
    return notes


def concat_adapters(
    adapters: Sequence[SavedModel], counts: Sequence[int], folder: Path
) -> list[str]:
    """Write one adapter of rank sum r_i that acts as the mean of `adapters` to a new `folder`;
    returns notes for the user.

    lora_alpha grows with the rank, so that alpha / r stays the first adapter's scale; the others'
    scales go into their B.

    Raises:
        ConfigError: an adapter is not plain LoRA (see `adapter_scale`).
    """
    first, scales = adapters[0], [adapter_scale(adapter) for adapter in adapters]
    notes: list[str] = []
    tensors = {
        name: _concatenated(name, adapters, counts, scales).to(first.read(name).dtype).contiguous()
        if _LORA.fullmatch(name)
        else _mean(name, adapters, counts, notes)
        for name in first.names
    }
    rank = sum(adapter.config["r"] for adapter in adapters)
    shutil.copytree(first.folder, folder, ignore=_NOT_COPIED)
    save_file(tensors, folder / ADAPTER, metadata=first.metadata(ADAPTER))
    config = first.config | {"r": rank, "lora_alpha": scales[0] * rank, "use_rslora": False}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    return notes


@torch.no_grad()
def add_adapters(
    base: torch.nn.Module, adapters: Sequence[SavedModel], counts: Sequence[int]
) -> list[str]:
    """Add the mean of the adapters' products to the weights of `base`, in place; returns notes for
    the user.

    Raises:
        ConfigError: an adapted weight is tied to another or belongs to a layer that is no matrix;
            an adapter is not plain LoRA (see `adapter_scale`).
    """
    first, scales = adapters[0], [adapter_scale(adapter) for adapter in adapters]
    weights = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    notes: list[str] = []
    for name in first.names:
        lora = _LORA.fullmatch(name)
        if lora and lora[2] == "B":
            continue
        target = (
            (lora[1] + ".weight" if lora else name)
            .removeprefix("base_model.model.")
            .replace(".base_layer.", ".")
        )
        if target not in weights:
            raise ConfigError(f"{first.name} adapts {target}, which the base model does not have")
        weight = weights[target]
        tied = [other for other, w in weights.items() if w is weight and other != target]
        if tied:
            raise ConfigError(
                f"{target} was adapted, but in the base model it is one tensor with {tied[0]} "
                "(tied), so a whole model cannot hold both; merge the adapters with --adapter "
                "concat"
            )
        if lora:
            of_b = f"{name[: lora.start(2)]}B{name[lora.end(2) :]}"
            b, a = (_concatenated(half, adapters, counts, scales) for half in (of_b, name))
            module = base.get_submodule(target.rpartition(".")[0])
            weight.copy_(weight.double() + _as_stored(scales[0] * b @ a, module))
        else:
            weight.copy_(_mean(name, adapters, counts, notes))
    return notes


def adapter_scale(adapter: SavedModel) -> float:
    """The scale s of an adapter that acts as W + s B A: lora_alpha / r; with rsLoRA lora_alpha /
    sqrt(r).

    Raises:
        ConfigError: an option makes it act otherwise (DoRA, rank patterns, biases, PiSSA, ...).
        CheckpointError: its configuration is damaged.
    """
    from peft import LoraConfig

    config = adapter.config
    plain = {"peft_type": "LORA", **LoraConfig().to_dict()}
    unlike = {
        key: value
        for key, value in config.items()
        if key not in _FOLLOWED and value != plain.get(key)
    }
    if config.get("peft_type") != "LORA":
        unlike["peft_type"] = config.get("peft_type")
    # Other initialisations change the base model's weights.
    if config.get("init_lora_weights") not in (True, False, "gaussian"):
        unlike["init_lora_weights"] = config.get("init_lora_weights")
    odd = [name for name in adapter.names if ".lora_" in name and not _LORA.fullmatch(name)]
    if unlike or odd:
        found = f"{next(iter(unlike))}={next(iter(unlike.values()))}" if unlike else odd[0]
        raise ConfigError(
            f"the adapter of {adapter.name} has {found}, so it is not W + s B A with one s, and "
            "its mean is no adapter; only plain LoRA can be merged"
        )
    _check_numbers(adapter)
    return config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )


def _check_numbers(adapter: SavedModel) -> None:
    """CheckpointError unless rank and alpha are numbers, and the rank is that of the tensors."""
    where, config = adapter.folder / ADAPTER_CONFIG, adapter.config
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{where} is damaged: r={rank} is no rank of an adapter")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e30:
        raise CheckpointError(f"{where} is damaged: lora_alpha={alpha} is no scale of an adapter")
    for name in adapter.names:
        lora = _LORA.fullmatch(name)
        if lora and lora[2] == "A" and adapter.shape_of(name)[0] != rank:
            raise CheckpointError(
                f"{where} is damaged: it has r={rank}, and {name} has rank "
                f"{adapter.shape_of(name)[0]}"
            )


def _mean(
    name: str, models: Sequence[SavedModel], counts: Sequence[int], notes: list[str]
) -> torch.Tensor:
    tensors = _read_all(name, models)
    first = tensors[0]
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in tensors):
            notes.append(
                f"{name} ({first.dtype}) differs between the runs; the merge has that of "
                f"{models[0].name}"
            )
        return first
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, count in zip(tensors, counts, strict=True):
        total += tensor.double() * count
    return (total / sum(counts)).to(first.dtype)


def _concatenated(
    name: str, adapters: Sequence[SavedModel], counts: Sequence[int], scales: Sequence[float]
) -> torch.Tensor:
    """All A below each other, or all c_i B_i beside each other; float64."""
    tensors = [tensor.double() for tensor in _read_all(name, adapters)]
    lora = _LORA.fullmatch(name)
    assert lora is not None
    if lora[2] == "A":
        return torch.cat(tensors, dim=0)
    shares = zip(tensors, counts, scales, strict=True)
    return torch.cat(
        [b * count / sum(counts) * (scale / scales[0]) for b, count, scale in shares], dim=1
    )


def _read_all(name: str, models: Sequence[SavedModel]) -> list[torch.Tensor]:
    """One tensor of each model. ConfigError if one model has nan or inf that the mean would spread;
    equal masks may hold inf."""
    tensors = [model.read(name) for model in models]
    for model, tensor in zip(models, tensors, strict=True):
        if not torch.isfinite(tensor).all() and not all(
            torch.equal(tensor, other) for other in tensors
        ):
            raise ConfigError(
                f"{name} of {model.name} has numbers that are not finite; leave {model.name} out"
            )
    return tensors


def _as_stored(change: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """The product B A, shape (out, in), in the layout of the module's weight."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (Conv1D, torch.nn.Embedding)):
        return change.T
    if isinstance(module, torch.nn.Linear):
        return change
    raise ConfigError(
        f"an adapter of {type(module).__name__} cannot be written into the whole model; use "
        "--adapter concat"
    )
