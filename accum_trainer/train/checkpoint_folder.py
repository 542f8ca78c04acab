"""A run's checkpoints: their order, the one to continue from, and those to delete.

The newest is the one that was written last: a run that went back to an earlier checkpoint writes
lower steps again. Folders with other names than ours are never touched.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from accum_trainer.errors import CheckpointError
from accum_trainer.train.checkpoint import check_manifest, read_manifest
from accum_trainer.train.run_folder import CHECKPOINTS, LAST, METRICS, RESULT, write_json

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{8,}")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def next_sequence(folder: Path) -> int:
    """The number of the checkpoint that is written next."""
    return 1 + max((_sequence(path) or 0 for path in list_checkpoints(folder)), default=0)


def prune(folder: Path, keep: int, keep_also: str = "") -> None:
    """Delete all but the newest `keep` checkpoints whose manifest can be read, and the one named
    `keep_also`."""
    known = [path for path in list_checkpoints(folder) if _sequence(path) is not None]
    kept = [*known[-keep:], folder / keep_also]
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
        return int(read_manifest(path)["sequence"])
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


def find_checkpoint(resume: str, run: Path | None, option: str = "resume") -> Path | None:
    """The checkpoint to continue from, or None to start anew.

    Args:
        resume: `auto`, the newest whole one of `run`; `never` or `anew`; or the path of a
            checkpoint, or of a run directory.
        run: the run directory; None if it is a new one.
        option: what gave `resume`, for messages.

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
            f"{option}={named} is no folder; give a run directory, or a checkpoint in it"
            + (", `auto`, `never` or `anew`" if option == "resume" else "")
        )
    if (named / CHECKPOINTS).is_dir():
        newest = newest_whole(named / CHECKPOINTS)
        if newest is None:
            raise CheckpointError(
                f"{option}={named} is a run without a whole checkpoint"
                + ("; start anew in another output_dir" if option == "resume" else "")
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
