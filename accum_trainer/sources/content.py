"""Digests of samples and batches, to tell whether two processes or two runs read the same.

Knows plain values, arrays and tensors, but no source, no window and no other rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch import Batch, tensors_of
from accum_trainer.sources.drawing import SeededIndices, drawing_from

# Of a larger array of floats, evenly spaced ones enter the digest.
MOST_FLOATS = 1 << 18


def digest_of_sample(dataset: Any, index: Any, draws: bool, **workers: Any) -> int:
    """The digest of one sample of a map-style data set; 0 if nothing can be said about it.

    The sample is read twice from the same random numbers, equal on all ranks. If that gives two
    contents, it draws from generators of its own, which may differ between ranks too.

    Args:
        dataset: it is read as a DataLoader reads it.
        index: of the sample.
        draws: reading may use the global random generators; they continue as if it had not.
        workers: options of a DataLoader to read it in a worker, because data sets may keep files
            open in the process that reads first; none to read it here.
    """
    twice = DataLoader(
        dataset,
        batch_sampler=[SeededIndices([index], 0) if draws else [index]] * 2,
        collate_fn=_digest_of_only,
        generator=torch.Generator(),  # a loader draws from the training's generator otherwise
        **workers,
    )
    try:
        with drawing_from(0) if draws and not workers else contextlib.nullcontext():
            first, second = twice
    except Exception:  # of any type: unknown content; an error in reading is raised when it is due
        return 0
    return first if first == second else 0


def _digest_of_only(samples: list[Any]) -> int:
    return digest_of(samples[0])


def digest_of(value: Any) -> int:
    """48 bits, exact in a float64, of plain values, arrays, tensors and containers of them.

    Floats that are not whole enter to four digits: processors and libraries differ in the last
    ones. Of the path of a file that is here, only the name enters.

    Raises:
        TypeError: a value of another type, which may differ between processes in ways that mean
            nothing, such as its address.
    """
    digest = hashlib.blake2b(digest_size=6)
    _add(digest.update, value)
    return int.from_bytes(digest.digest(), "big") or 1


def _add(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
        value = os.path.basename(value)  # its folder may be this machine's own
    if value is None or isinstance(value, (bool, int, str, bytes)):
        update(repr(value).encode(errors="surrogatepass"))
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        _add_array(update, (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())
    elif isinstance(value, Mapping):
        update(b"{")
        for key, entry in value.items():
            _add(update, key)
            _add(update, entry)
    elif isinstance(value, (list, tuple)):
        update(b"[")
        for entry in value:
            _add(update, entry)
    elif dataclasses.is_dataclass(value):
        _add(update, vars(value))
    elif isinstance(value, float) or hasattr(value, "__array_interface__"):  # images of PIL too
        _add_array(update, np.asarray(value))
    else:
        raise TypeError(f"no digest of a {type(value).__name__}")


def _add_array(update: Callable[[bytes], None], array: np.ndarray) -> None:
    update(repr((array.shape, array.dtype.str)).encode())
    if array.dtype.kind == "O":
        _add(update, array.ravel().tolist())
    elif array.dtype.kind in "fc":
        flat = array.ravel()[:: max(1, array.size // MOST_FLOATS)]
        numbers = flat.astype(np.complex128).view(np.float64)
        update(np.isfinite(numbers).tobytes())
        numbers = np.nan_to_num(numbers, posinf=0.0, neginf=0.0)
        if (numbers == np.rint(numbers)).all():
            update(numbers.tobytes())
            return
        weights = np.random.default_rng(0).standard_normal((3, numbers.size))
        update(" ".join(f"{one:.3e}" for one in weights @ numbers).encode())
    else:
        update(array.tobytes())


def crc_of_batches(batches: Iterable[Batch], crc: int = 0) -> int:
    """A CRC-32 of all tensors of these batches, bit by bit.

    Args:
        batches: of a loader.
        crc: of the batches before them.
    """
    for batch in batches:
        for tensor in tensors_of(batch):
            if tensor.layout == torch.strided and tensor.numel():
                plain = tensor.detach().cpu().contiguous().reshape(-1)
                crc = zlib.crc32(plain.view(torch.uint8).numpy().data, crc)
    return crc
