"""`PatchedHead`: the forward that replaces the output head's during one call of a model.

    chunked     keep the positions that have a target and return their summed loss in place of the
                logits; for a linear head whose output is the model's
    selected    return the logits of these positions only
    plain       run the head unchanged

The head runs once per forward in each, so processes that gather weights or exchange gradients do
so equally often. Knows autocast's dtypes, but not which path is right for a model: `head` proves
that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from accum_trainer.batch import IGNORE
from accum_trainer.errors import DataError
from accum_trainer.losses.chunked import chunked_loss

CHUNKED, SELECTED, PLAIN = "chunked", "selected", "plain"


class PatchedHead:
    """Replaces the forward of an output head during one call of its model.

    Args:
        head: the output head, hidden states to logits.
        wanted: `chunked` or `selected`.
        targets: the token that each position predicts, -100 for none, shape (samples, tokens).
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.
        positions: indices into the flattened targets that have one; None to look for them, which
            waits for the device.
        proving: return three numbers on the chunked path, not the loss, so that a model that
            changes its logits is caught.

    Attributes:
        path: the path taken: `wanted`; `selected` in float16; `plain` if the head was not run on
            hidden states of shape (samples, tokens, hidden).
        dtype: in which the logits were computed.
        chosen: the targets at the kept positions, shape (targets,); empty before the call.
        found: the loss, on the chunked path.
        given: the head's output as the model received it; None on the plain path.
    """

    def __init__(
        self,
        head: torch.nn.Module,
        wanted: str,
        targets: torch.Tensor,
        label_smoothing: float,
        positions: torch.Tensor | None = None,
        proving: bool = False,
    ) -> None:
        self._head, self._wanted, self._proving = head, wanted, proving
        self._targets, self._label_smoothing = targets, label_smoothing
        # Looked for before the forward: this waits for the GPU, which has least to do now.
        self._positions = _positions(targets) if positions is None else positions
        self.path = PLAIN
        self.dtype = torch.float32
        self.chosen = targets.new_empty(0)
        self.found: torch.Tensor | None = None
        self.given: torch.Tensor | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the head's place inside; its forward is restored afterwards."""
        # An attribute of the instance, not a hook: the engines' hooks gather the head's weights
        # around its forward.
        attributes = self._head.__dict__
        before = attributes.get("forward")
        self._forward = self._head.forward
        attributes["forward"] = self
        try:
            yield
        finally:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != self._targets.shape:
            return self._forward(*args, **kwargs)
        head: Any = self._head
        self.dtype = _compute_dtype(hidden, getattr(head, "weight", hidden))
        # In float16 the loss scale must enter the gradient of the logits, and is not known yet.
        is_chunked = self._wanted == CHUNKED and self.dtype != torch.float16
        self.path = CHUNKED if is_chunked else SELECTED
        positions = self._positions.to(hidden.device)
        if not is_chunked and len(positions) == 0:
            # One position without a target keeps every parameter in the graph.
            positions = positions.new_zeros(1)
        self.chosen = self._targets.flatten().to(hidden.device)[positions]
        kept = hidden.flatten(0, -2).index_select(0, positions)
        if is_chunked:
            self.found = chunked_loss(
                kept, head.weight, head.bias, self.chosen, self._label_smoothing, self.dtype
            )
            self.given = (
                torch.arange(3.0, device=hidden.device).view(1, 1, -1)
                if self._proving
                else self.found
            )
        else:
            self.given = self._forward(kept.unsqueeze(0), *args[1:], **kwargs)
        return self.given

    def loss_of(self, logits: torch.Tensor) -> torch.Tensor:
        """The summed loss, from the logits that the model returned.

        Raises:
            DataError: as `aligned_loss`, on the plain path.
        """
        if self.path == CHUNKED:
            # The sum of one number, not a view of it: FSDP2 warns of views, and a view cannot be
            # detached in place.
            return logits.sum()
        if self.path == PLAIN:
            return aligned_loss(logits, self._targets, self._label_smoothing)
        return cross_entropy(logits, self.chosen, self._label_smoothing)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Summed cross-entropy, float32 (float64 from float64 logits); targets of -100 do not count."""
    flat = logits.flatten(0, -2)
    return F.cross_entropy(
        flat if flat.dtype == torch.float64 else flat.float(),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def aligned_loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """`cross_entropy` of logits that must be at the positions of the targets.

    Raises:
        DataError: the model does not return one row of logits per label.
    """
    if logits.shape[:-1] != targets.shape:
        raise DataError(
            f"causal_lm_loss got labels of shape {tuple(targets.shape)}, and the model returned "
            f"logits of shape {tuple(logits.shape)}: the positions do not match. Pass "
            "model(**batch).loss to acc.backward() instead"
        )
    return cross_entropy(logits, targets, label_smoothing)


def has_values(tensor: torch.Tensor) -> bool:
    """False for meta and fake tensors, which have shapes only."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _positions(targets: torch.Tensor) -> torch.Tensor:
    """Indices into the flattened `targets` that have one; all of them if there are no values."""
    if not has_values(targets):
        return torch.arange(targets.numel(), device=targets.device)
    return (targets.flatten() != IGNORE).nonzero().squeeze(1)


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in here, under autocast or not."""
    device = hidden.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
