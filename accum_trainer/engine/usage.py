"""Which parameters the backwards of a window use, known before the first of their gradients is
made."""

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
        parameters: name -> what autograd sees of it, whole.
        are_whole: they are so now; otherwise only inside a forward or backward.

    Attributes:
        used: names that some backward of the window in hand used.
        used_now: names that the last one used.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], are_whole: bool = True) -> None:
        self._parameters = parameters
        # A parameter does not hold its node, which knows the shape that it was made with.
        self._nodes = _nodes(parameters) if are_whole else {}
        self.used: set[str] = set()
        self.used_now: set[str] = set()

    def watch(self, loss: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        """At the start of `loss`'s backward note what it will use, and call `then`."""

        def note(gradient: torch.Tensor) -> None:
            # What torch's own register_multi_grad_hook asks.
            nodes = self._nodes or _nodes(self._parameters)
            self.used_now = {
                name for name, node in nodes.items() if torch._C._will_engine_execute_node(node)
            }
            self.used |= self.used_now
            if then is not None:
                then()

        if loss.requires_grad:
            loss.register_hook(note)

    def left_out(self, used: set[str]) -> list[str]:
        return [name for name in self._parameters if name not in used]


def _nodes(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: get_gradient_edge(parameter).node for name, parameter in parameters.items()}


def refuse_difference(ranks: Ranks, unused: Sequence[str], engine: str) -> None:
    """Raise an EngineError on all ranks where what they left `unused` differs. Collective."""
    everyones = [set(names) for names in ranks.gather_objects(list(unused))]
    differing = sorted(set.union(*everyones) - set.intersection(*everyones))
    if differing:
        raise EngineError(
            _refusal(
                differing,
                next(r for r, names in enumerate(everyones) if differing[0] in names),
                engine,
            )
        )


def refuse(ranks: Ranks, unused: Sequence[str], engine: str) -> None:
    """Raise an EngineError for what this rank left out, where the others cannot be asked."""
    raise EngineError(_refusal(unused, ranks.rank, engine))


def _refusal(names: Sequence[str], rank: int, engine: str) -> str:
    return (
        f"process {rank} left {len(names)} parameters unused, such as {names[0]}, and another "
        "process may have used them; "
        f"{engine} exchanges what each process used and would add one parameter's gradient to "
        "another's: use DDP or (from torch "
        "2.13) FSDP2, which average them exactly, or use every parameter in each micro-batch"
    )
