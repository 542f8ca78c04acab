"""Losses that a model returned: its own, and that of a mixture of experts' router.

The prepared models are watched, so that `backward` can tell the model's own loss from one that the
user computed. Knows how models of transformers return losses; knows no engine and no window.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.batch import tensors_of, version_of


def own_loss(outputs: Any) -> torch.Tensor | None:
    """The scalar loss in a model's output: `.loss`, the first of a tuple, or the output itself."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("loss")
    elif isinstance(outputs, (tuple, list)):
        found = outputs[0] if outputs else None
    elif not isinstance(outputs, torch.Tensor):
        found = getattr(outputs, "loss", None)
    is_scalar = isinstance(found, torch.Tensor) and found.numel() == 1
    return found if is_scalar and found.is_floating_point() else None


def router_loss(outputs: Any) -> torch.Tensor | None:
    """The load-balancing loss of a mixture of experts, not yet multiplied by its coefficient."""
    found = getattr(outputs, "aux_loss", None)
    return found if isinstance(found, torch.Tensor) else None


def _named(model: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; for a wrapper, by the names of the wrapped forward."""
    if not args:
        return inputs
    plain: Any = model
    while isinstance(getattr(plain, "module", None), torch.nn.Module):
        plain = plain.module
    try:
        return dict(inspect.signature(plain.forward).bind(*args, **inputs).arguments)
    except (TypeError, ValueError):
        return inputs


# The coefficient's names: most models of transformers; JetMoe and similar ones.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(model: torch.nn.Module) -> float | None:
    """The factor of the router's loss in the model's own loss; None if the model names none."""
    plain: Any = model
    while not hasattr(plain, "config") and isinstance(
        getattr(plain, "module", None), torch.nn.Module
    ):
        plain = plain.module
    config = getattr(plain, "config", None)
    for holder in (plain, getattr(config, "text_config", None), config):
        for name in _COEFFICIENTS:
            found = getattr(holder, name, None)
            if isinstance(found, (int, float)):
                return float(found)
    return None


@dataclass(frozen=True)
class Call:
    """One call of a model by the loop.

    Attributes:
        inputs: its arguments by name.
        router_term: the router's loss times its coefficient, with its graph; None if there is none.
        has_unknown_router: there is a router's loss without a known coefficient.
        num_routed: calls since `begin` that returned a router's loss, including this one.
        output: a tensor with its graph that is no loss; kept only if `begin` asked for it.
    """

    inputs: dict[str, Any]
    router_term: torch.Tensor | None = None
    has_unknown_router: bool = False
    num_routed: int = 0
    output: torch.Tensor | None = None


class OutputWatch:
    """The last call under autograd of the watched models.

    Attributes:
        call: the last one; None before the first and after `clear`.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self._num_routed = 0
        self._keeps_output = False
        self._own: tuple[weakref.ReferenceType[torch.Tensor], int] | None = None
        self._own_node: Any = None  # in the graph, also after the loss itself is gone
        self._watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def watch(self, model: torch.nn.Module) -> None:
        """Record the inputs and outputs of `model` from now on, as the loop calls it."""
        if model not in self._watched:
            self._watched.add(model)
            model.register_forward_hook(self._note, with_kwargs=True)

    def _note(
        self, model: torch.nn.Module, args: Any, inputs: dict[str, Any], outputs: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return  # a proof or an evaluation: nothing to differentiate
        loss, router = own_loss(outputs), router_loss(outputs)
        self._own = None if loss is None else (weakref.ref(loss), version_of(loss))
        self._own_node = None if loss is None else loss.grad_fn
        coefficient = 0.0 if router is None else router_coefficient(model)
        term = router * coefficient if router is not None and coefficient else None
        self._num_routed += term is not None
        named, output = _named(model, args, inputs), None
        if self._keeps_output:
            output = next((t for t in tensors_of(outputs) if t.requires_grad and t.ndim > 0), None)
        self.call = Call(named, term, coefficient is None, self._num_routed, output)

    def begin(self, keeps_output: bool = False) -> None:
        """Restart the count of calls: those before a micro-batch do not belong to it."""
        self._num_routed = 0
        self._keeps_output = keeps_output

    def is_own(self, loss: torch.Tensor) -> bool:
        """Whether `loss` is the loss that a watched model returned last, unchanged."""
        found = None if self._own is None else self._own[0]()
        if found is None or self._own is None or version_of(found) != self._own[1]:
            return False
        return found is loss or (loss.numel() == 1 and found.data_ptr() == loss.data_ptr())

    def is_scaled_own(self, loss: torch.Tensor) -> bool:
        """Whether `loss` is the loss that a watched model returned last, times a number."""
        node: Any = loss.grad_fn
        while self._own_node is not None and node is not None:
            if node is self._own_node:
                return node is not loss.grad_fn
            inputs = [function for function, _ in node.next_functions if function is not None]
            is_product = node.name().startswith(("DivBackward", "MulBackward"))
            node = inputs[0] if is_product and len(inputs) == 1 else None
        return False

    def zero(self) -> torch.Tensor | None:
        """A 0 with the graph of the last call, also if its loss is nan; None without an output."""
        output = None if self.call is None else self.call.output
        return None if output is None else (output.float() * 0).nan_to_num().sum()

    def clear(self) -> None:
        """Let go of the last call."""
        self._own = self.call = self._own_node = None
