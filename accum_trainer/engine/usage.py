"""Which parameters the backwards of a window use, known before their first gradient exists.

It knows autograd's graph and nothing of windows: an engine clears `Usage.used` at a window's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import EngineError


class Usage:
    """Notes, at the start of each backward, which parameters it will give a gradient.

    Args:
        parameters: by name, the whole tensor that autograd sees.
        are_whole: the tensors are whole now; otherwise only inside a forward or backward.

    Attributes:
        used: names that some backward of the window in hand used.
        used_now: names that the last backward used.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], are_whole: bool = True) -> None:
        self._parameters = parameters
        # A parameter does not keep its node alive. A node knows the shape it was made with, so
        # nodes of sharded parameters are made when the parameters are whole.
        self._nodes = _nodes(parameters) if are_whole else {}
        self.used: set[str] = set()
        self.used_now: set[str] = set()

    def watch(self, loss: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        """At the start of `loss`'s backward, note the parameters it will use and call `then`."""

        def note(gradient: torch.Tensor) -> None:
            nodes = self._nodes or _nodes(self._parameters)
            will_run = torch._C._will_engine_execute_node  # noqa: SLF001 - as in torch's hooks
            self.used_now = {name for name, node in nodes.items() if will_run(node)}
            self.used |= self.used_now
            if then is not None:
                then()

        if loss.requires_grad:
            loss.register_hook(note)

    def left_out(self, used: set[str]) -> list[str]:
        return [name for name in self._parameters if name not in used]


def _nodes(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: get_gradient_edge(parameter).node for name, parameter in parameters.items()}


class Agreement:
    """Has all ranks leave out the same parameters before gradients are reduced that each rank has,
    or end.

    They ask each other in the first window, and as long as any of them leaves one out. A rank that
    does so when nobody asks ends alone: the others would wait for it, or add gradients of different
    parameters.

    Args:
        engine: its name, for messages.

    Attributes:
        left_some_out: whether this rank ever has. The exchange at a window's end carries it.
    """

    def __init__(self, ranks: Ranks, engine: str) -> None:
        self._ranks, self._engine = ranks, engine
        self._asks_others, self.left_some_out = True, False

    def check(self, unused: Sequence[str]) -> None:
        """Before a reduction. Collective, if they ask each other.

        Raises:
            EngineError: the ranks differ, or may.
        """
        if self._ranks.world_size == 1:
            return
        self.left_some_out = self.left_some_out or bool(unused)
        if self._asks_others:
            self._refuse_difference(unused)
        elif unused:
            raise EngineError(_refusal(unused, self._ranks.rank, self._engine))

    def hear(self, anyone: bool) -> None:
        """At a window's end: whether any rank ever left one out."""
        self._asks_others = anyone

    def _refuse_difference(self, unused: Sequence[str]) -> None:
        everyones = [set(names) for names in self._ranks.gather_objects(list(unused))]
        differing = sorted(set.union(*everyones) - set.intersection(*everyones))
        if differing:
            first = next(r for r, names in enumerate(everyones) if differing[0] in names)
            raise EngineError(_refusal(differing, first, self._engine))


def _refusal(names: Sequence[str], rank: int, engine: str) -> str:
    first = names[0].split()[-1]  # some engines put the number of its model before it
    return (
        f"process {rank} left {len(names)} parameters unused, such as {first}, and another "
        f"process may have used them; {engine} exchanges the gradients that each process has and "
        "would add one parameter's to another's: use DDP or (from torch 2.13) FSDP2, which average "
        "them exactly, or use every parameter in each micro-batch"
    )
