"""Nodes that start a job again together: node 0 decides, and the others follow it.

A failure on one node ends the processes of all, which lose each other. Node 0 then starts again or
ends. Each other node starts again and waits where the processes meet, until node 0 comes or has
ended. How a start ended on a node is noted in the run directory (`node_ending`), which all see: it
also tells nodes whose processes have not noticed that they wait for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from accum_trainer.launch.node_ending import Ending, ending_of, note_ending
from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.restarting import Restarting
from accum_trainer.launch.signals import STOPPED_AND_SAVED

# Processes that lose others mostly end by themselves, in their own words.
_NOTICED_WITHIN_SEC = 30.0


class StartingTogether(Restarting):
    """The restarts of one node among several; made before its first start.

    Args:
        decides: what node 0 decides by; not used on another node.
        train: arguments of `train`.
    """

    def __init__(
        self, logs: Path, place: NodePlacement, train: Sequence[str], decides: Restarting
    ) -> None:
        self._logs, self._node = logs, place.machine_rank
        self._train, self._decides = train, decides
        self._restart = 0
        self._lost_at: float | None = None
        self._earlier = {  # of another launch
            node: ending_of(logs, node) for node in range(place.num_machines) if node != self._node
        }

    def after_failure(self) -> tuple[Sequence[str] | None, str]:
        again: Sequence[str] | None
        ended = self._first_node()
        if self._node == 0:
            again, line = self._decides.after_failure()
        elif ended is not None:
            again = None
            line = f"not started again: node 0 has ended, with status {ended.status}"
        else:
            again = self._train
            line = "starting the processes of this node again, to meet those of node 0"
        if again is not None:
            note_ending(self._logs, Ending(1, restart=self._restart, is_last=False), self._node)
            self._restart, self._lost_at = self._restart + 1, None
        return again, line

    def is_over(self) -> bool:
        return self._first_node() is not None

    def lost_node(self) -> int | None:
        node = next((node for node in self._earlier if self._has_failed(node)), None)
        if node is None:
            return None
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        return node if now - self._lost_at > _NOTICED_WITHIN_SEC else None

    def end(self, status: int) -> None:
        """Note that this node will not start again; not if a refusal has left nothing behind."""
        if self._logs.is_dir():
            note_ending(self._logs, Ending(status, restart=self._restart), self._node)

    def _first_node(self) -> Ending | None:
        """How node 0 has ended; None while it goes on, and on node 0."""
        ending = self._new(0)
        return ending if ending is not None and ending.is_last else None

    def _has_failed(self, node: int) -> bool:
        """Whether its part of the start that is under way here has."""
        ending = self._new(node)
        if ending is None or ending.restart != self._restart:
            return False
        return ending.status not in (0, STOPPED_AND_SAVED)

    def _new(self, node: int) -> Ending | None:
        if node == self._node:
            return None
        found = ending_of(self._logs, node)
        return None if found == self._earlier[node] else found
