"""The files of a checkpoint: each rank's part, and a manifest without which they are nothing.

    step-00000100/
      part-00000-of-00002.safetensors   what process 0 had of the trained weights, the buffers and
                                        the optimizer's state; its random generators
      part-00001-of-00002.safetensors
      state.json                        counters, position, scheduler, loss scaler, the optimizer's
                                        options, and what the run is
      manifest.json                     size and SHA-256 of each file above; how many checkpoints
                                        the run had written with this one; its own SHA-256

Read on any number of processes and by any engine; only after every byte matches the manifest. No
file holds a pickle: torch.distributed.checkpoint's metadata is one, and its shards are rows, which
ZeRO's are not. Knows neither engines nor processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from accum_trainer.engine.own_parts import (
    MODEL,
    OPTIMIZER,
    NamedTensors,
    Part,
    StoredPart,
    WholeTensors,
)
from accum_trainer.errors import CheckpointError, first_line

MANIFEST, STATE = "manifest.json", "state.json"
_FORMAT = 3
_PART = re.compile(r"part-(\d{5})-of-(\d{5})\.safetensors")
_RNG = "rng"
# That hash files at the same time.
_MOST_THREADS = 8
# safetensors' names of dtypes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes into a checkpoint, in host memory.

    Attributes:
        parts: of weights, buffers and optimizer state.
        rng: this rank's random generators.
        state: everything else, as JSON values, the same on every rank.
    """

    parts: Sequence[Part]
    rng: dict[str, Any]
    state: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(part.values.nbytes for part in self.parts)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint. A tensor is read when it is asked for: a process that shards
    weights and optimizer state need not have room for the whole.

    Attributes:
        model: trained parameters and buffers by name.
        optimizer: {"state": {parameter name: {key: tensor}}, "groups": [options of each group]}.
        rng: one generator state per rank that wrote it.
        state: everything else, as JSON values.
    """

    model: NamedTensors
    optimizer: dict[str, Any]
    rng: list[dict[str, Any]]
    state: dict[str, Any]


def check_same_weights(
    saved: Mapping[str, tuple[int, ...]], current: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a CheckpointError if the names or shapes of two sets of weights differ.

    Args:
        saved, current: name -> shape.
    """
    if saved.keys() != current.keys():
        differing = sorted(saved.keys() ^ current.keys())
        raise CheckpointError(
            f"the checkpoint's weights are not this model's: {len(differing)} names differ, such "
            f"as {differing[0]}"
        )
    for name, shape in saved.items():
        if current[name] != shape:
            raise CheckpointError(
                f"the checkpoint's {name} has shape {shape}, this model's {current[name]}"
            )


# --- writing ---


def part_name(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def write_part(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write one rank's part; return its entry in the manifest.

    In pieces, and hashed on the way: safetensors' own writer holds Python's lock until the file is
    written, which would stop training meanwhile, and the file would be read again to hash it.
    """
    tensors = {f"{part.tensor}@{part.begin}": part.values for part in snapshot.parts}
    shapes = {part.tensor: part.shape for part in snapshot.parts}
    generators = {k: v for k, v in snapshot.rng.items() if isinstance(v, torch.Tensor)}
    tensors |= {f"{_RNG}/{name}": value for name, value in generators.items()}
    numbers = {k: v for k, v in snapshot.rng.items() if k not in generators}
    header: dict[str, Any] = {
        "__metadata__": {"shapes": json.dumps(shapes), _RNG: json.dumps(numbers)}
    }
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{name.partition('@')[0]} is {tensor.dtype}, which safetensors files cannot hold; "
                "use another dtype, or for a buffer persistent=False"
            )
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    sha = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for piece in _pieces([struct.pack("<Q", len(encoded)) + encoded], tensors.values()):
            sha.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
    return {"size": path.stat().st_size, "sha256": sha.hexdigest()}


def _pieces(first: list[bytes], tensors: Any) -> Iterator[memoryview]:
    for data in first:
        yield memoryview(data)
    for tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        for begin in range(0, raw.size, 1 << 24):
            yield raw[begin : begin + (1 << 24)].data


def write_manifest(
    folder: Path, sequence: int, state: dict[str, Any], parts: dict[str, dict[str, Any]]
) -> None:
    """Write what makes the parts in `folder` a checkpoint.

    Args:
        sequence: how many checkpoints the run has written with this one.
        parts: the entry of each part, by name.
    """
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    size, sha256 = (folder / STATE).stat().st_size, _digest(folder / STATE)
    files = parts | {STATE: {"size": size, "sha256": sha256}}
    manifest = {"format": _FORMAT, "sequence": sequence, "files": files}
    (folder / MANIFEST).write_text(
        json.dumps(manifest | {"sha256": digest_of(manifest)}, indent=1), encoding="utf-8"
    )


# --- reading ---


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of this version's format that matches its own SHA-256.

    Raises:
        CheckpointError: it is not that.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is no object")
        if manifest.get("format") != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {manifest.get('format')}; this version reads "
                f"{_FORMAT}"
            )
        if manifest.pop("sha256", None) != digest_of(manifest):
            raise ValueError("it is not what was written")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: its {MANIFEST} {_fault(error)}"
        ) from None
    # Whoever computes a digest may still have written anything.
    files = manifest.get("files")
    if (
        not isinstance(manifest.get("sequence"), int)
        or not isinstance(files, dict)
        or not all(isinstance(v, dict) and v.keys() == {"size", "sha256"} for v in files.values())
        or not _parts_of(files)
        or files.keys() != {STATE, *_parts_of(files)}
    ):
        raise CheckpointError(
            f"{path} is not a checkpoint: its {MANIFEST} lists other files than {STATE} and one "
            "part of each process"
        )
    return manifest


def _parts_of(names: Any) -> list[str]:
    """The names of all parts that belong to those in `names`, by rank."""
    found = [matched for name in names if (matched := _PART.fullmatch(name))]
    world_size = int(found[0][2]) if found else 0
    # Many processes of which few have files: their names would fill the memory.
    if world_size != len(found):
        return []
    return [part_name(rank, world_size) for rank in range(world_size)]


def check_manifest(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raise a CheckpointError unless every file has the size and SHA-256 in the manifest.

    Args:
        share: (i, n): this is one of n processes that see the same files and each read every n-th.
    """
    files = list(read_manifest(path)["files"].items())[share[0] :: share[1]]
    with ThreadPoolExecutor(_MOST_THREADS) as threads:  # hashing leaves Python's lock
        list(threads.map(lambda entry: _check_file(path, *entry), files))


def _check_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    file = path / name
    try:
        size = file.stat().st_size
        is_whole = size == expected["size"] and _digest(file) == expected["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error})") from None
    if not is_whole:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {name} is not what its manifest lists"
        )


def _fault(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({error})" if isinstance(error, OSError) else "is damaged"


def load_checkpoint(path: Path, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Open a checkpoint after checking its manifest.

    Args:
        share: of the files to check here, as `check_manifest` takes it.

    Raises:
        CheckpointError: it is damaged or missing, or something else wrote it.
    """
    check_manifest(path, share)
    parts = [path / name for name in _parts_of(read_manifest(path)["files"])]
    try:
        tensors = WholeTensors(part for file in parts for part in _stored_parts(file))
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        groups = [_group(options) for options in state["optimizer_groups"]]
        rng = [_read_rng(file) for file in parts]
    except Exception as error:  # of any type: the bytes are those of the manifest, whoever wrote it
        raise CheckpointError(
            f"{path} was not written by accum_trainer: {type(error).__name__}: {first_line(error)}"
        ) from None
    optimizer = {"state": tensors.below(OPTIMIZER), "groups": groups}
    return Checkpoint(tensors.named(MODEL), optimizer, rng, state)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint without its tensors, which are not checked.

    Raises:
        CheckpointError: it is damaged or missing.
    """
    expected = read_manifest(path)["files"][STATE]
    try:
        data = (path / STATE).read_bytes()
        state = json.loads(data) if hashlib.sha256(data).hexdigest() == expected["sha256"] else None
    except (OSError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} is damaged: its {STATE} cannot be read")
    return state


def _stored_parts(file: Path) -> Iterator[StoredPart]:
    opened = safe_open(file, "pt")  # mapped into memory until no part of it is left
    shapes = json.loads(opened.metadata()["shapes"])
    for key in opened.keys():  # noqa: SIM118 - no mapping
        if not key.startswith(f"{_RNG}/"):
            name, _, begin = key.rpartition("@")
            entry = opened.get_slice(key)
            numel, dtype = math.prod(entry.get_shape()), _BY_NAME[entry.get_dtype()]
            read = partial(opened.get_tensor, key)
            yield StoredPart(name, tuple(shapes[name]), int(begin), numel, dtype, read)


def _read_rng(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        numbers: dict[str, Any] = json.loads(opened.metadata()[_RNG])
        generators = [key for key in opened.keys() if key.startswith(f"{_RNG}/")]  # noqa: SIM118
        return numbers | {k.removeprefix(f"{_RNG}/"): opened.get_tensor(k) for k in generators}


def _group(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options as the optimizer has them: JSON knows no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        sha = hashlib.sha256()
        while block := file.read(1 << 20):
            sha.update(block)
        return sha.hexdigest()


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
