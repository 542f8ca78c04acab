"""Nodes that train together: what each notes of how its processes ended, and how they start again.

A failure on one node ends the processes of all, which lose each other. Node 0 then starts again or
ends. Each other node starts again and waits where the processes meet, until node 0 comes or has
ended. The notes lie in the run directory, which all see. They also end processes that have not
noticed that they wait for nobody, and a wait for a node that has ended.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.restarting import Restarting
from accum_trainer.launch.signals import STOPPED_AND_SAVED

# Processes that lose others mostly end by themselves, in their own words.
_NOTICED_WITHIN_SEC = 30.0


@dataclass(frozen=True)
class _Note:
    """How a start ended on a node.

    Attributes:
        port: where the launch first met: it tells one launch from another beside it.
        restart: the number of the start, from 0.
        status: the exit status of the launcher.
        is_last: whether the launcher will not start again.
        written: when, in ns: it tells one launch from an earlier one.
    """

    port: int | None
    restart: int
    status: int
    is_last: bool
    written: int = 0

    @property
    def has_failed(self) -> bool:
        return self.status not in (0, STOPPED_AND_SAVED)


class StartingTogether(Restarting):
    """The restarts of one node among several; made before its first start.

    Args:
        logs: of the run directory.
        train: arguments of `train`.
        decides: of node 0, what it decides by.
        starts_again: whether this node starts again at all.
    """

    def __init__(
        self,
        logs: Path,
        place: NodePlacement,
        train: Sequence[str],
        decides: Restarting,
        starts_again: bool,
    ) -> None:
        self._logs, self._node, self._train = logs, place.machine_rank, train
        self._decides, self._starts_again = decides, starts_again
        self._others = [node for node in range(place.num_machines) if node != self._node]
        self._port = place.main_process_port
        self._restart = 0
        # What is there when the processes have met for the first time is of another launch.
        self._earlier: dict[int, _Note | None] | None = None
        self._lost_at: float | None = None

    def has_met(self) -> None:
        if self._earlier is None:
            self._earlier = {node: self._read(node) for node in self._others}

    def after_failure(self) -> tuple[Sequence[str] | None, str]:
        over = self._over()
        if over is not None:
            return None, f"not started again: node {over[0]} has ended, with status {over[1]}"
        if self._node == 0:
            again, line = self._decides.after_failure()
        elif self._starts_again:
            again = self._train
            line = "starting the processes of this node again, to meet those of node 0"
        else:
            again, line = None, ""
        if again is not None:
            self._write(1, is_last=False)
            self._restart, self._lost_at = self._restart + 1, None
        return again, line

    def is_over(self) -> bool:
        return self._over() is not None

    def lost_node(self) -> int | None:
        node = next((node for node in self._others if self._has_failed(node)), None)
        if node is None:
            return None
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        return node if now - self._lost_at > _NOTICED_WITHIN_SEC else None

    def end(self, status: int) -> None:
        """Note that this node will not start again. One that has never met the others says
        nothing: it may be a second launch beside them."""
        if self._earlier is not None and self._logs.is_dir():
            self._write(status, is_last=True)

    def _over(self) -> tuple[int, int] | None:
        """(a node that will not start again, its status)."""
        for node in self._others:
            note = self._new(node)
            if note is not None and note.is_last:
                return node, note.status
        return None

    def _has_failed(self, node: int) -> bool:
        """Whether its processes have, in the start that is under way here."""
        note = self._new(node)
        if note is None or not (note.is_last or note.restart == self._restart):
            return False
        return note.has_failed

    def _new(self, node: int) -> _Note | None:
        """The note of a node that has met this one; None if it goes on."""
        if self._earlier is None:
            return None
        found = self._read(node)
        return None if found == self._earlier[node] else found

    def _write(self, status: int, is_last: bool) -> None:
        note = _Note(self._port, self._restart, status, is_last)
        with contextlib.suppress(OSError):
            partial = self._logs / f".together-{self._node}.partial"
            partial.write_text(json.dumps(asdict(note)))
            partial.replace(self._file(self._node))

    def _read(self, node: int) -> _Note | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            read = json.loads(self._file(node).read_text())
            if read["port"] == self._port:
                restart, status = int(read["restart"]), int(read["status"])
                written = self._file(node).stat().st_mtime_ns
                return _Note(self._port, restart, status, read["is_last"] is True, written)
        return None

    def _file(self, node: int) -> Path:
        return self._logs / f"together-{node}.json"
