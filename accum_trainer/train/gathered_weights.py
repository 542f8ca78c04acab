"""The whole weights of a model on the main process, without holding them in memory.

Every process takes part in gathering each weight, and only the main one keeps it. What is more than
fits a small buffer goes into files beside the run's own, which are mapped, not read: of a large
model no process holds more than the buffer and one weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from accum_trainer.train import durable

_FOLDER = ".gathered-weights"
_BUFFER_BYTES = 2**29


@contextlib.contextmanager
def gathered_weights(
    engine: Any, model: Any, folder: Path, trained_only: bool, dtype: torch.dtype | None
) -> Iterator[tuple[dict[str, torch.Tensor] | None, str]]:
    """(whole weights by name on the CPU, "") on the main process, valid inside the `with`; (None,
    why they could not be kept) if a file cannot be written; (None, "") elsewhere. Collective.

    Args:
        folder: the run directory.
        trained_only: leave out frozen parameters.
        dtype: of floating weights; None for their own.
    """
    kept = _Kept(folder / _FOLDER) if engine.is_main else None
    try:
        for name, weight in engine.each_full_weight(model, trained_only):
            if kept is not None:
                kept.take(name, weight, dtype if weight.is_floating_point() else None)
        yield (None, "") if kept is None else kept.all()
    finally:
        if kept is not None:
            kept.remove()


class _Kept:
    """Weights that come one after another, in files of `_BUFFER_BYTES` and, after the last of
    them, in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, 0
        self._buffer: dict[str, torch.Tensor] = {}
        self._failure = ""
        durable.remove(folder)  # of a process that was killed

    def take(self, name: str, weight: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Keep a weight. After an error all are dropped: the other processes go on to the last, and
        would wait for this one."""
        if self._failure:
            return
        try:
            self._buffer[name] = weight.to("cpu", dtype)
            if sum(w.nbytes for w in self._buffer.values()) > _BUFFER_BYTES:
                self._write()
        except Exception as error:  # of any type, such as a MemoryError
            self._failure = f"{self._folder} could not be written: {error}"
            self._buffer = {}

    def _write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{self._files}.safetensors"
        save_file({n: w.contiguous() for n, w in self._buffer.items()}, file)
        self._files += 1
        self._buffer = {}

    def all(self) -> tuple[dict[str, torch.Tensor] | None, str]:
        if self._failure:
            return None, self._failure
        found: dict[str, torch.Tensor] = {}
        for number in range(self._files):
            found |= load_file(self._folder / f"{number}.safetensors")
        return found | self._buffer, ""

    def remove(self) -> None:
        self._buffer = {}
        durable.remove(self._folder)
