"""The weighted mean of models: tensor by tensor, and of LoRA adapters by what they do.

A part i counts n_i of N = sum n_i. Sums are made in float64 and rounded once, to each tensor's own
dtype.

    mean      X = sum_i n_i X_i / N
    concat    A = [A_1; ...; A_n]   B = [c_1 B_1, ..., c_n B_n]   c_i = n_i s_i / (N s_1)
              so that s_1 B A = sum_i n_i/N s_i B_i A_i, the mean of the products
    product   W = W_base + sum_i n_i/N s_i B_i A_i

where an adapter acts as W + s B A. A mean of the A and of the B would be none of these: mean(B)
mean(A) has cross terms B_i A_j that nobody trained. Knows folders that `from_pretrained` loads and
how much each counts; nothing of runs.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.runs.merge_inputs import read_json

ADAPTER_CONFIG, ADAPTER, MODEL = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
)
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# Options of LoRA that do not change what its A and B do, or that are followed here; any other must
# be at its default.
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


class SavedModel:
    """The tensors of a folder that `save_pretrained` wrote, whole model or adapter, in one file or
    several.

    Tensors are read when they are asked for, one at a time.

    Args:
        folder: with model.safetensors, its shards and their index, or adapter_model.safetensors.
        name: of this model in messages.

    Raises:
        CheckpointError: no such weights, or a file that is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.is_adapter = (folder / ADAPTER_CONFIG).is_file()
        self.config = read_json(folder / ADAPTER_CONFIG) if self.is_adapter else {}
        index = folder / f"{MODEL}.index.json"
        files = [ADAPTER] if self.is_adapter else [MODEL]
        if not self.is_adapter and not (folder / MODEL).exists() and index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        try:
            self._files = {file: safe_open(folder / file, "pt") for file in files}
        except FileNotFoundError:
            raise CheckpointError(
                f"{name} has no weights: {folder} holds no {' or '.join(files)}"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"the weights of {name} in {folder} are damaged: {error}"
            ) from None
        self.layout = {file: list(opened.keys()) for file, opened in self._files.items()}
        self._file_of = {
            tensor: file for file, tensors in self.layout.items() for tensor in tensors
        }

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in order."""
        return sorted(self._file_of)

    def kind_of(self, tensor: str) -> str:
        """Dtype and shape of a tensor, `F32 (50, 16)`, from the file's header."""
        header = self._files[self._file_of[tensor]].get_slice(tensor)
        return f"{header.get_dtype()} {tuple(header.get_shape())}"

    def read(self, tensor: str) -> torch.Tensor:
        return self._files[self._file_of[tensor]].get_tensor(tensor)

    def metadata(self, file: str) -> dict[str, str] | None:
        return self._files[file].metadata()


def check_alike(models: Sequence[SavedModel]) -> None:
    """Raise a ConfigError unless all are whole models or all adapters, of the same tensors, shapes
    and dtypes."""
    first = models[0]
    for other in models[1:]:
        both = f"{first.name} and {other.name} cannot be averaged:"
        if first.is_adapter != other.is_adapter:
            adapter, whole = (first, other) if first.is_adapter else (other, first)
            raise ConfigError(
                f"{both} {adapter.name} is a LoRA adapter, {whole.name} a whole model; merge like "
                "with like"
            )
        lonely = sorted(set(first.names) ^ set(other.names))
        if lonely:
            owner, without = (first, other) if lonely[0] in first.names else (other, first)
            raise ConfigError(
                f"{both} {owner.name} has {lonely[0]}, {without.name} has not; merge runs of one "
                "model"
            )
        for name in first.names:
            if first.kind_of(name) != other.kind_of(name):
                raise ConfigError(
                    f"{both} {name} is {first.kind_of(name)} in {first.name}, "
                    f"{other.kind_of(name)} in {other.name}; "
                    "merge runs of one model"
                )


def average_models(models: Sequence[SavedModel], counts: Sequence[int], folder: Path) -> list[str]:
    """Write the mean of whole models to a new `folder`, with the first one's other files; return
    what to note.

    Holds one file of the result and one tensor of each model. Tensors that are not floating point
    are the first model's.
    """
    shutil.copytree(models[0].folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    notes: list[str] = []
    for file, names in models[0].layout.items():
        tensors = {name: _mean(name, models, counts, notes) for name in names}
        save_file(tensors, folder / file, metadata=models[0].metadata(file))
    return notes


def concat_adapters(
    adapters: Sequence[SavedModel], counts: Sequence[int], folder: Path
) -> list[str]:
    """Write one adapter of rank sum r_i that acts as the mean of `adapters` to a new `folder`;
    return what to note.

    lora_alpha grows with the rank, so that alpha / r stays the first adapter's; another's own scale
    goes into its B.

    Raises:
        ConfigError: adapters that a product B A does not describe (see `adapter_scale`).
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
    shutil.copytree(first.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / ADAPTER, metadata=first.metadata(ADAPTER))
    config = first.config | {"r": rank, "lora_alpha": scales[0] * rank, "use_rslora": False}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    return notes


@torch.no_grad()
def add_adapters(
    base: torch.nn.Module, adapters: Sequence[SavedModel], counts: Sequence[int]
) -> list[str]:
    """Add the mean of the adapters' products to the weights of `base`, in place; return what to
    note.

    Raises:
        ConfigError: an adapted weight that is one tensor with another (tied), or of a layer that is
            no matrix; adapters that a product B A does not describe (see `adapter_scale`).
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
                "(tied), so that a whole model "
                "cannot hold both; merge the adapters with --adapter concat"
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
    """s of an adapter that acts as W + s B A: lora_alpha / r, or lora_alpha / sqrt(r) with
    rank-stabilised LoRA.

    Raises:
        ConfigError: an option is set under which it does not act so (DoRA, rank patterns, biases,
            PiSSA, ...).
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
    if config.get("init_lora_weights") not in (
        True,
        False,
        "gaussian",
    ):  # others change the base model's weights
        unlike["init_lora_weights"] = config.get("init_lora_weights")
    odd = [name for name in adapter.names if ".lora_" in name and not _LORA.fullmatch(name)]
    if unlike or odd:
        found = f"{next(iter(unlike))}={next(iter(unlike.values()))}" if unlike else odd[0]
        raise ConfigError(
            f"the adapter of {adapter.name} has {found}: it is not W + s B A with one s, and its "
            "mean is no adapter; "
            "only plain LoRA can be merged"
        )
    return config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )


def _mean(
    name: str, models: Sequence[SavedModel], counts: Sequence[int], notes: list[str]
) -> torch.Tensor:
    tensors = _read_all(name, models)
    first = tensors[0]
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in tensors):
            notes.append(
                f"{name} ({first.dtype}) differs between the parts; the merge has that of "
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
    """A below A, or B beside B each with its share and its scale over the first's; float64."""
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
    """One tensor of each model; ConfigError where a mean would spread one model's nan or inf (equal
    masks may hold inf)."""
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
    """B A, shape (out, in), in the layout of a module's weight."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (Conv1D, torch.nn.Embedding)):
        return change.T
    if isinstance(module, torch.nn.Linear):
        return change
    raise ConfigError(
        f"an adapter of {type(module).__name__} cannot be written into the whole model; use "
        "--adapter concat"
    )
