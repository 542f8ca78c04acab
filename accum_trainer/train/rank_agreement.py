"""Agreement between the processes of a run before its first update.

They need the same options, one run directory on a file system that all see, one checkpoint that
rank 0 chose, and after loading it the same position and weights. Each is compared; if a process
differs, all raise an error that names it and its host. Every rank calls these functions in the same
order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from accum_trainer.config import TrainConfig
from accum_trainer.errors import CheckpointError, ConfigError, EngineError
from accum_trainer.train import durable
from accum_trainer.train.checkpoint import MANIFEST
from accum_trainer.train.checkpoint_folder import find_checkpoint
from accum_trainer.train.run_folder import (
    CHECKPOINTS,
    LOGS,
    check_places,
    holds_run,
    new_run_folder,
)
from accum_trainer.train.run_lock import RunLock

# Seconds until another machine must see a file; its NFS client caches for a while that it was
# missing.
_SEEN_WITHIN = 30.0
# The same machine sees it at once. Containers may share a host name, so this is not 0.
_SEEN_HERE_WITHIN = 3.0
# Paths may differ between machines: the files' contents are compared elsewhere, and only rank 0
# writes the log.
_MAY_DIFFER = {"dataset_file", "eval_file", "model", "log_file"}


def agree_on_folder(engine: Any, config: TrainConfig) -> tuple[Path, RunLock | None]:
    """The run directory; and on the main process, if it holds a run already, its lock.

    Raises:
        ConfigError: options differ between ranks, or the directory cannot be used, is not shared,
            or is in use.
    """
    _check_same_options(engine, config)
    engine.together(check_places, config)
    given = Path(config.output_dir) if config.output_dir else None
    # Named by rank 0: the default holds the time.
    folder = given or Path(engine.gather_objects(str(new_run_folder(config.model)))[0])
    _check_shared(engine, folder)
    return folder, None if config.dry_run else engine.on_main(_lock, folder)


def _lock(folder: Path) -> RunLock | None:
    if not holds_run(folder):
        return None
    lock = RunLock.take(folder)
    durable.finish_replacing_in(folder / CHECKPOINTS)  # what a process that was killed has left
    return lock


def _check_same_options(engine: Any, config: TrainConfig) -> None:
    """Raise a ConfigError on all ranks unless they were given the same options."""
    options = {name: v for name, v in dataclasses.asdict(config).items() if name not in _MAY_DIFFER}
    everyones = engine.gather_objects((options, socket.gethostname()))
    first, first_host = everyones[0]  # another version of this package may know other options
    for rank, (others, host) in enumerate(everyones):
        for name, value in others.items():
            if value != first.get(name):
                raise ConfigError(
                    f"{name}={value} on process {rank} ({host}), {name}={first.get(name)} on "
                    f"process 0 ({first_host}): all processes of a run take the same options; does "
                    "a shell variable differ between them?"
                )


def _check_shared(engine: Any, folder: Path) -> None:
    """Raise a ConfigError on all ranks unless each sees in `folder` the file that rank 0 writes
    there. Leaves nothing behind.

    Only rank 0 writes into a run directory, so separate folders would train; but when the run is
    continued, the other ranks would find no checkpoint, or an old one.
    """
    if engine.world_size == 1:
        return
    # The logs are the only folder that a run directory may have before its run.
    here, logs = socket.gethostname(), folder / LOGS
    note = f".seen-by-all-{uuid.uuid4().hex}"
    made: list[Path] | None = engine.on_main(_leave, logs, note)
    try:
        note, writer, written = engine.gather_objects((note, here, str(folder.absolute())))[0]
        engine.together(_look_for, folder, note, engine.rank, here, writer, written)
    finally:
        if made is not None:
            (logs / note).unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):  # something else is in it by now
                    path.rmdir()


def _leave(logs: Path, note: str) -> list[Path]:
    """Write a note into `logs`; return the folders created for it, innermost first."""
    missing = [path for path in [logs.absolute(), *logs.absolute().parents] if not path.exists()]
    logs.mkdir(parents=True, exist_ok=True)
    (logs / note).touch()
    return missing


def _look_for(folder: Path, note: str, rank: int, here: str, writer: str, written: str) -> None:
    if not _is_seen(folder / LOGS / note, _SEEN_HERE_WITHIN if here == writer else _SEEN_WITHIN):
        raise ConfigError(
            f"output_dir={folder} is a separate folder on process {rank} ({here}, "
            f"{folder.absolute()}): it does not show the file that process 0 wrote ({writer}, "
            f"{written}), so the run could not be continued; give an output_dir on a file system "
            "that all processes share"
        )


def _is_seen(path: Path, within: float) -> bool:
    end = time.monotonic() + within
    while not path.exists():
        if time.monotonic() > end:
            return False
        with contextlib.suppress(OSError), os.scandir(path.parent):
            pass  # opening a folder makes NFS ask the server again
        time.sleep(0.05)
    return True


def agree_on_checkpoint(engine: Any, config: TrainConfig) -> Path | None:
    """The checkpoint that rank 0 finds (`find_checkpoint`), on every rank; None if the run starts
    anew.

    Raises:
        CheckpointError: the given path holds none, or a rank does not have the same one there.
    """
    given = Path(config.output_dir) if config.output_dir else None
    return _agreed(engine, engine.on_main(find_checkpoint, config.resume, given))


def agree_on_origin(engine: Any, config: TrainConfig) -> Path | None:
    """The checkpoint that `branch_from` names, on every rank; None without the option.

    Raises:
        CheckpointError: as `agree_on_checkpoint`.
    """
    if config.branch_from is None:
        return None
    return _agreed(engine, engine.on_main(find_checkpoint, config.branch_from, None, "branch_from"))


def _agreed(engine: Any, found: Path | None) -> Path | None:
    """The checkpoint that rank 0 has `found`, on every rank that has the same one there."""
    mine = (found, socket.gethostname(), _digest(found / MANIFEST) if found is not None else "")
    chosen, writer, digest = engine.gather_objects(mine)[0]
    if chosen is not None:
        engine.together(_check_has, chosen, digest, engine.rank, writer)
    return chosen


def _check_has(path: Path, digest: str, rank: int, writer: str) -> None:
    here, manifest = socket.gethostname(), path / MANIFEST
    seen = _is_seen(manifest, _SEEN_HERE_WITHIN if here == writer else _SEEN_WITHIN)
    if not seen or _digest(manifest) != digest:
        found = "holds another checkpoint" if seen else "holds none"
        raise CheckpointError(
            f"process 0 ({writer}) continues from {path}, and on process {rank} ({here}) "
            f"{path.absolute()} {found}; keep checkpoints on a file system that all processes share"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_same_start(engine: Any, start: dict[str, Any]) -> None:
    """Raise an EngineError on all ranks unless `start` (counters, position, checksums) is the same
    on each."""
    everyones = engine.gather_objects((start, socket.gethostname()))
    first = everyones[0][0]
    for rank, (others, host) in enumerate(everyones):
        differing = [
            f"{key} {others[key]} instead of {first[key]}"
            for key in first
            if others[key] != first[key]
        ]
        if differing:
            raise EngineError(
                f"process {rank} ({host}) would start from another state than process 0: "
                f"{', '.join(differing)}; do all processes have the same model, data and "
                "checkpoint?"
            )
