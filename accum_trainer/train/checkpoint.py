"""Checkpoints: written whole or not at all, and read only after every byte matches the manifest.

    step-00000100/
      model.safetensors   trained parameters and buffers
      optimizer.pt        optimizer state
      rng.pt              random generators of every rank
      state.json          counters, position, scheduler, loss scaler, and what the run is
      manifest.json       size and SHA-256 of each file above

Written at window ends only, so no half-accumulated gradient exists to lose. Knows neither engines
nor processes: the caller has one process write while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from accum_trainer.errors import CheckpointError
from accum_trainer.train.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        model: trained parameters and buffers by name.
        optimizer: the optimizer's state by parameter name, and the options of its groups.
        rng: one generator state per rank that wrote it.
        state: everything else, as JSON values.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    rng: list[dict[str, Any]]
    state: dict[str, Any]


def check_same_weights(saved: dict[str, torch.Tensor], current: dict[str, torch.Tensor]) -> None:
    """Raise a CheckpointError if the names or shapes of two sets of weights differ."""
    if saved.keys() != current.keys():
        differing = sorted(saved.keys() ^ current.keys())
        raise CheckpointError(
            f"the checkpoint's weights are not this model's: {len(differing)} names differ, such "
            f"as {differing[0]}"
        )
    for name, tensor in saved.items():
        if current[name].shape != tensor.shape:
            raise CheckpointError(
                f"the checkpoint's {name} has shape {tuple(tensor.shape)}, this model's "
                f"{tuple(current[name].shape)}"
            )


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-NNNNNNNN` and delete all but the newest `keep`; return its path.

    Written beside, synced to disk, then renamed into place: a process killed at any moment leaves
    the last checkpoint whole and at most a `.partial` folder, which the next save removes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}"
    partial.mkdir()
    save_file(
        {name: t.contiguous() for name, t in checkpoint.model.items()},
        partial / "model.safetensors",
    )
    torch.save(checkpoint.optimizer, partial / "optimizer.pt")
    torch.save(checkpoint.rng, partial / "rng.pt")
    (partial / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(partial.iterdir())
    }
    (partial / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1))
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    if target.exists():  # the same step saved again, after a run was continued from an earlier one
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, unchecked."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that matches its manifest; a damaged newer one is skipped with a
    warning."""
    for path in reversed(list_checkpoints(folder)):
        try:
            check_manifest(path)
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            continue
        return path
    return None


def find_checkpoint(resume: str, run: Path | None) -> Path | None:
    """The checkpoint to continue from, or None to start anew.

    Args:
        resume: `auto`, the newest whole one of `run`; `never`; or the path of a checkpoint, or of a
            run directory.
        run: the run directory; None if it is a new one.

    Raises:
        CheckpointError: the path is not a folder, or holds no whole checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_whole(run / CHECKPOINTS) if run else None
    named = Path(resume)
    if not named.is_dir():
        raise CheckpointError(
            f"resume={named} is no folder; give a run directory, a checkpoint in it, `auto` or "
            "`never`"
        )
    if (named / CHECKPOINTS).is_dir():
        newest = newest_whole(named / CHECKPOINTS)
        if newest is None:
            raise CheckpointError(
                f"resume={named} is a run without a whole checkpoint; start anew with resume=never"
            )
        return newest
    try:
        check_manifest(named)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_others_near(named)}") from None
    return named


def _others_near(path: Path) -> str:
    """What to give instead of `path`: the run that it lies in, or another checkpoint of it."""
    for run in (path, *path.parents[:2]):
        if others := [other for other in list_checkpoints(run / CHECKPOINTS) if other != path]:
            return f"give the run, {run}, or a checkpoint in it, such as {others[-1]}"
    return f"give a run directory, or a checkpoint in it (RUN/{CHECKPOINTS}/step-N)"


def check_manifest(path: Path) -> None:
    """Raise a CheckpointError unless every file has the size and SHA-256 in the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {manifest['format']}; this version reads {_FORMAT}"
            )
        listed = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: its {MANIFEST} {_fault(error)}"
        ) from None
    for name, expected in listed:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != expected["size"] or _digest(file) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is not what its manifest lists"
            )


def _fault(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({error})" if isinstance(error, OSError) else "is damaged"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking its manifest.

    Raises:
        CheckpointError: it is damaged or missing.
    """
    check_manifest(path)
    return Checkpoint(
        model=load_file(path / "model.safetensors"),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        rng=torch.load(path / "rng.pt", map_location="cpu", weights_only=True),
        state=json.loads((path / "state.json").read_text()),
    )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        sha = hashlib.sha256()
        while block := file.read(1 << 20):
            sha.update(block)
        return sha.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
