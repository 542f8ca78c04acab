"""Writes checkpoints while training goes on: every rank its own part, in a thread of its own.

    save()      copies this rank's parts into host memory; training waits for that only
    the thread  writes and hashes the part, and leaves a note with its size and digest
    rank 0's    waits for all notes, writes the manifest and renames the folder into place

Ranks find each other through files, so no thread takes part in a collective. A process that is
killed at any moment leaves the last checkpoint whole, and at most a `.partial-` folder, which the
next save removes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import CheckpointError
from accum_trainer.train import durable
from accum_trainer.train.checkpoint import Snapshot, part_name, write_manifest, write_part
from accum_trainer.train.checkpoint_folder import folder_name, next_sequence, note_last, prune

logger = logging.getLogger(__name__)

# Of the space that a checkpoint takes: names, positions, generators.
_MARGIN, _SMALL = 1.02, 1_000_000
# Seconds that rank 0 waits for the other parts once its own is written.
_PATIENCE_SEC = 3600.0
_SEEN_WITHIN_SEC = 60.0


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time.

    Args:
        ranks: this process among the others.
        run: the run directory.
        keep: newest checkpoints to keep.
        before_write: called on rank 0 before anything is written; its error ends the run.
    """

    def __init__(
        self, ranks: Ranks, run: Path, keep: int, before_write: Callable[[], None] = lambda: None
    ) -> None:
        self._ranks, self._run, self._keep = ranks, run, keep
        self._before_write = before_write
        self._folder = run / "checkpoints"
        self._thread: threading.Thread | None = None
        self._failure, self._is_last, self._keep_also = "", False, ""
        self._ended = threading.Event()
        self.longest_sec = 0.0  # from the copy to the rename

    def save(
        self, step: int, snapshot: Snapshot, is_last: bool = False, keep_also: str = ""
    ) -> None:
        """Begin to write a checkpoint, after the one before. Collective; does not wait for the
        disk.

        Args:
            keep_also: the name of a checkpoint to keep besides the newest.

        If it cannot be written, what was there before is as it was; a warning says so, but not of
        the last, for which `wait` is asked.
        """
        self.wait()
        self._is_last, self._keep_also = is_last, keep_also
        sizes = self._ranks.gather_objects(snapshot.nbytes)
        began = self._ranks.on_main(self._begin, step, sum(sizes))
        partial, sequence = self._ranks.gather_objects(began)[0]
        if partial is None:  # rank 0 has noted why
            return
        self._thread = threading.Thread(
            target=self._write_all, args=(partial, step, sequence, snapshot), daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Return when no checkpoint is being written; `wait` still says whether one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> str:
        """Wait for the checkpoint that is being written; why it could not be, on rank 0, else
        ""."""
        self.finish()
        failure, self._failure = self._failure, ""
        return failure

    def give_up(self, after_sec: float = 60.0) -> None:
        """Wait for what is being written, but no longer for other processes than this: they may
        have ended."""
        if self._thread is not None:
            self._thread.join(after_sec)
        self._ended.set()

    def _begin(self, step: int, nbytes: int) -> tuple[Path | None, int]:
        """On rank 0: the folder to write into, None if there is no room."""
        self._before_write()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".partial-*"):
                shutil.rmtree(leftover)
            durable.finish_replacing_in(self._folder)
            _check_space(self._folder, nbytes)
            partial = self._folder / f".partial-{folder_name(step)}-{uuid.uuid4().hex[:8]}"
            partial.mkdir()
        except OSError as error:
            self._note_failure(step, error)
            return None, 0
        return partial, next_sequence(self._folder)

    def _note_failure(self, step: int, error: object) -> None:
        self._failure = (
            f"the checkpoint {self._folder / folder_name(step)} could not be written: {error}"
        )
        if not self._is_last:
            logger.warning(
                "%s; training goes on, and it is tried again when the next is due", self._failure
            )

    # --- in the thread ---

    def _write_all(self, partial: Path, step: int, sequence: int, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            self._write_own(partial, snapshot)
            if self._ranks.is_main:
                self._complete(partial, step, sequence, snapshot.state)
        except Exception as error:  # of any type: a thread has nobody to raise to
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                self._note_failure(step, error)
            else:
                with contextlib.suppress(OSError):
                    # On a full disk there is room for the note only without the part.
                    self._own_part(partial).unlink(missing_ok=True)
                    durable.write_text(
                        _note(partial, self._ranks.rank), json.dumps({"error": str(error)})
                    )
        self.longest_sec = max(self.longest_sec, time.monotonic() - began)

    def _write_own(self, partial: Path, snapshot: Snapshot) -> None:
        part = self._own_part(partial)
        _wait_until_seen(partial)
        entry = write_part(part, snapshot)
        durable.sync(part)
        if not self._ranks.is_main:
            durable.write_text(_note(partial, self._ranks.rank), json.dumps(entry))
            return
        self._own_entry = entry

    def _own_part(self, partial: Path) -> Path:
        return partial / part_name(self._ranks.rank, self._ranks.world_size)

    def _complete(self, partial: Path, step: int, sequence: int, state: dict[str, Any]) -> None:
        parts = {part_name(0, self._ranks.world_size): self._own_entry}
        until = time.monotonic() + _PATIENCE_SEC
        for rank in range(1, self._ranks.world_size):
            entry = self._wait_for(_note(partial, rank), until)
            if "error" in entry:
                raise CheckpointError(f"process {rank}: {entry['error']}")
            parts[part_name(rank, self._ranks.world_size)] = entry
            _note(partial, rank).unlink()
        write_manifest(partial, sequence, state, parts)
        target = self._folder / folder_name(step)
        durable.put_in_place(partial, target)
        note_last(self._run, target)
        prune(self._folder, self._keep, self._keep_also)

    def _wait_for(self, note: Path, until: float) -> dict[str, Any]:
        pause = 0.002
        while True:
            with contextlib.suppress(FileNotFoundError):
                return dict(json.loads(note.read_text(encoding="utf-8")))
            if time.monotonic() > until or self._ended.wait(pause):
                raise CheckpointError(f"no part came from the process of {note.name}")
            pause = min(2 * pause, 0.5)


def is_being_written(run: Path) -> bool:
    """Whether a checkpoint of a run was begun that is not in place."""
    return any((run / "checkpoints").glob(".partial-*"))


def _note(partial: Path, rank: int) -> Path:
    """Where a rank says that its part is written, or why not."""
    return partial / f"rank-{rank:05d}.json"


def _wait_until_seen(folder: Path) -> None:
    """Another machine's file system may know of a new folder a little later."""
    until = time.monotonic() + _SEEN_WITHIN_SEC
    while not folder.is_dir() and time.monotonic() < until:
        time.sleep(0.05)


def _check_space(folder: Path, nbytes: int) -> None:
    """Raise an OSError if the file system has less room than `nbytes` take."""
    needed, free = _MARGIN * nbytes + _SMALL, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")
