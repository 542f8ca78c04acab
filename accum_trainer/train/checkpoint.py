"""Checkpoints: written whole or not at all, and read only after every byte matches the manifest.

    step-00000100/
      model.safetensors   trained parameters and buffers
      optimizer.pt        optimizer state
      rng.pt              random generators of every rank
      state.json          counters, position, scheduler, loss scaler, and what the run is
      manifest.json       size and SHA-256 of each file above; how many checkpoints the run had
                          written before it; its own SHA-256

Written at window ends only, so no half-accumulated gradient exists to lose. The newest is the one
that was written last: a run that went back to an earlier checkpoint writes lower steps again. Knows
neither engines nor processes: the caller has one process write while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from accum_trainer.errors import CheckpointError
from accum_trainer.train import durable
from accum_trainer.train.run_folder import CHECKPOINTS, LAST, METRICS, RESULT, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MODEL, _OPTIMIZER, _RNG, _STATE = _FILES = (
    "model.safetensors",
    "optimizer.pt",
    "rng.pt",
    "state.json",
)
_FORMAT = 2
_NAME = re.compile(r"step-\d{8,}")
# Of the space that a checkpoint takes, for names and for what torch adds to each file.
_MARGIN = 1.02


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

    Raises:
        CheckpointError: there is too little space, or writing failed. What was there before is as
            it was.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        durable.finish_replacing_in(folder)
        sequence = 1 + max((_sequence(path) or 0 for path in list_checkpoints(folder)), default=0)
        _check_space(folder, checkpoint)
        partial.mkdir()
        _write(partial, checkpoint, step, sequence)
        durable.put_in_place(partial, target)
    # safetensors and torch have types of their own for a failed write.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {target} could not be written: {error}") from error
    _prune(folder, keep)
    return target


def _write(partial: Path, checkpoint: Checkpoint, step: int, sequence: int) -> None:
    save_file({name: t.contiguous() for name, t in checkpoint.model.items()}, partial / _MODEL)
    torch.save(checkpoint.optimizer, partial / _OPTIMIZER)
    torch.save(checkpoint.rng, partial / _RNG)
    (partial / _STATE).write_text(json.dumps(checkpoint.state, indent=1))
    files = {
        name: {"size": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
        for name in _FILES
    }
    manifest = {"format": _FORMAT, "step": step, "sequence": sequence, "files": files}
    (partial / MANIFEST).write_text(
        json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=1)
    )


def _check_space(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise an OSError if the file system has less room than the tensors take."""
    parts = (checkpoint.model, checkpoint.optimizer, checkpoint.rng)
    needed = _MARGIN * sum(tensor.nbytes for part in parts for tensor in _tensors(part))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inside)


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints whose manifest can be read."""
    known = [path for path in list_checkpoints(folder) if _sequence(path) is not None]
    kept = known[-keep:]
    for path in list_checkpoints(folder):
        if path not in kept:
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be deleted: %s", path, error)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, that written last at the end, unchecked.

    One whose manifest cannot be read has the place of its step.
    """
    found = [path for path in folder.iterdir() if _is_checkpoint(path)] if folder.is_dir() else []
    found.sort(key=_step)
    latest, places = 0, {}
    for path in found:
        sequence = _sequence(path)
        latest = max(latest, sequence or 0)
        places[path] = (latest if sequence is None else sequence, _step(path))
    return sorted(found, key=places.__getitem__)


def _is_checkpoint(path: Path) -> bool:
    return bool(_NAME.fullmatch(path.name)) and path.is_dir()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sequence(path: Path) -> int | None:
    """How many checkpoints the run had written with this one; None without a whole manifest."""
    try:
        return int(_read_manifest(path)["sequence"])
    except CheckpointError:
        return None


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


def note_last(run: Path, checkpoint: Path) -> None:
    """Note in the run directory which checkpoint was written last, so that a loss of all of them is
    seen."""
    write_json(run / LAST, {"checkpoint": f"{CHECKPOINTS}/{checkpoint.name}"})


def find_checkpoint(resume: str, run: Path | None) -> Path | None:
    """The checkpoint to continue from, or None to start anew.

    Args:
        resume: `auto`, the newest whole one of `run`; `never` or `anew`; or the path of a
            checkpoint, or of a run directory.
        run: the run directory; None if it is a new one.

    Raises:
        CheckpointError: the path is not a folder, or holds no whole checkpoint; `auto`, and the
            run's checkpoints are gone.
    """
    if resume in ("never", "anew"):
        return None
    if resume == "auto":
        return _newest_of(run) if run else None
    named = Path(resume)
    if not named.is_dir():
        raise CheckpointError(
            f"resume={named} is no folder; give a run directory, a checkpoint in it, `auto`, "
            "`never` or `anew`"
        )
    if (named / CHECKPOINTS).is_dir():
        newest = newest_whole(named / CHECKPOINTS)
        if newest is None:
            raise CheckpointError(
                f"resume={named} is a run without a whole checkpoint; start anew in another "
                "output_dir"
            )
        return newest
    try:
        check_manifest(named)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_others_near(named)}") from None
    return named


def _newest_of(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if it has not written one yet.

    Raises:
        CheckpointError: it has, and none is left.
    """
    found = newest_whole(run / CHECKPOINTS)
    last = _last_of(run)
    if found is None and (last is not None or (run / RESULT).is_file()):
        raise CheckpointError(
            f"{run} holds a run that was saved ({last or RESULT}), and none of its checkpoints is "
            f"whole: the same command would train it anew and replace its {METRICS} and model; put "
            "the checkpoints back, choose another output_dir, or give resume=anew to have that"
        )
    if found is not None and last is not None and not (run / last).is_dir():
        logger.warning("%s is gone; continuing from %s", run / last, found)
    return found


def _last_of(run: Path) -> str | None:
    """The checkpoint that `note_last` noted, relative to the run directory."""
    try:
        noted = json.loads((run / LAST).read_text(encoding="utf-8"))["checkpoint"]
        return f"{CHECKPOINTS}/{Path(noted).name}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return LAST  # damaged: a checkpoint was written, but it is not known which


def _others_near(path: Path) -> str:
    """What to give instead of `path`: the run that it lies in, or another checkpoint of it."""
    for run in (path, *path.parents[:2]):
        if others := [other for other in list_checkpoints(run / CHECKPOINTS) if other != path]:
            return f"give the run, {run}, or a checkpoint in it, such as {others[-1]}"
    return f"give a run directory, or a checkpoint in it (RUN/{CHECKPOINTS}/step-N)"


def check_manifest(path: Path) -> None:
    """Raise a CheckpointError unless every file has the size and SHA-256 in the manifest."""
    for name, expected in _read_manifest(path)["files"].items():
        file = path / name
        try:
            is_whole = (
                file.stat().st_size == expected["size"] and _digest(file) == expected["sha256"]
            )
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error})") from None
        if not is_whole:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is not what its manifest lists"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
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
        if manifest.pop("sha256", None) != _digest_of(manifest):
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
        or files.keys() != set(_FILES)
        or not all(isinstance(v, dict) and v.keys() == {"size", "sha256"} for v in files.values())
    ):
        raise CheckpointError(
            f"{path} is not a checkpoint: its {MANIFEST} does not list {', '.join(_FILES)}"
        )
    return manifest


def _fault(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({error})" if isinstance(error, OSError) else "is damaged"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking its manifest; no code that it holds is run.

    Raises:
        CheckpointError: it is damaged or missing, or something else wrote it.
    """
    check_manifest(path)
    try:
        return Checkpoint(
            model=load_file(path / _MODEL),
            optimizer=torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True),
            rng=torch.load(path / _RNG, map_location="cpu", weights_only=True),
            state=json.loads((path / _STATE).read_text()),
        )
    except Exception as error:  # of any type: the bytes are those of the manifest, whoever wrote it
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} was not written by accum_trainer: {type(error).__name__}: {first}"
        ) from None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        sha = hashlib.sha256()
        while block := file.read(1 << 20):
            sha.update(block)
        return sha.hexdigest()


def _digest_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
