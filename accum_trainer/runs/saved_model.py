"""The tensors of a folder that `from_pretrained` loads, read one at a time. Knows no runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.runs.inside import check_is_name
from accum_trainer.runs.json_file import read_json

ADAPTER_CONFIG, ADAPTER, MODEL = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
)


class SavedModel:
    """A whole model or an adapter as `save_pretrained` wrote it, in one file or several.

    Args:
        folder: with model.safetensors, its shards and their index, or adapter_model.safetensors.
        name: of this model in messages.

    Attributes:
        layout: file -> the names of its tensors.
        config: adapter_config.json; empty for a whole model.

    Raises:
        CheckpointError: no such weights, or a file is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.is_adapter = (folder / ADAPTER_CONFIG).is_file()
        self.config = read_json(folder / ADAPTER_CONFIG) if self.is_adapter else {}
        index = folder / f"{MODEL}.index.json"
        files = [ADAPTER] if self.is_adapter else [MODEL]
        if not self.is_adapter and not (folder / MODEL).exists() and index.is_file():
            files = _files_in(index)
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
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def kind_of(self, tensor: str) -> str:
        """Dtype and shape of a tensor, `F32 (50, 16)`, from the file's header."""
        header = self._files[self._file_of[tensor]].get_slice(tensor)
        return f"{header.get_dtype()} {tuple(header.get_shape())}"

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header; (1,) for a single number."""
        return tuple(self._files[self._file_of[tensor]].get_slice(tensor).get_shape()) or (1,)

    def read(self, tensor: str) -> torch.Tensor:
        return self._files[self._file_of[tensor]].get_tensor(tensor)

    def metadata(self, file: str) -> dict[str, str] | None:
        return self._files[file].metadata()


def _files_in(index: Path) -> list[str]:
    """The files that an index lists, sorted. CheckpointError if one is not a name in its folder:
    the merge writes a file of the same name."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} is damaged: its weight_map is no map of tensors to files")
    return sorted({check_is_name(name, index) for name in listed.values()})


def check_alike(models: Sequence[SavedModel]) -> None:
    """Raise a ConfigError unless all are whole models or all are adapters, with tensors of the same
    names, shapes and dtypes."""
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
                f"{both} {owner.name} has {lonely[0]}, {without.name} does not; merge runs of one "
                "model"
            )
        for name in first.names:
            if first.kind_of(name) != other.kind_of(name):
                raise ConfigError(
                    f"{both} {name} is {first.kind_of(name)} in {first.name}, "
                    f"{other.kind_of(name)} in {other.name}; merge runs of one model"
                )
