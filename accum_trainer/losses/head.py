"""Logits only where there are targets: the same loss and gradient in less time and memory.

A causal model ends in its output head, hidden states to logits, its largest tensor. Prompts and
padding have no target, and the result is one number. While the model runs, `PatchedHead` replaces
the head's forward, for any model of transformers and inside any engine's wrapper. The model itself
proves, once, which path holds: `chunked`, else `selected` (the model changes its logits, as
Gemma-2's soft cap does, or the head is no plain linear layer, as with LoRA), else `plain`.

Knows how engines wrap a model (`dry_run`), but no class of model and no window.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from accum_trainer.batch import IGNORE, version_of
from accum_trainer.losses.dry_run import inside_wrapper, is_compiled, undisturbed
from accum_trainer.losses.patched_head import (
    CHUNKED,
    PLAIN,
    SELECTED,
    PatchedHead,
    aligned_loss,
    cross_entropy,
    has_values,
)

# Relative tolerance between paths; 16-bit products of different shapes round differently.
TOLERANCE, TOLERANCE_16_BIT = 1e-5, 1e-2


@dataclass(frozen=True)
class LossPath:
    """How a model's loss is computed.

    Attributes:
        path: `chunked`, `selected` or `plain`.
        reason: why this path and no faster one.
    """

    path: str
    reason: str

    @property
    def note(self) -> str | None:
        """A line for the user if the path is not the fastest one; else None."""
        return None if self.path == CHUNKED else f"loss path {self.path}: {self.reason}"


_Head = weakref.ReferenceType[torch.nn.Module]
# Cache keyed by model. A replaced head (resized or adapted) invalidates it, and another model
# around the same head has its own entry. The head is held weakly: an engine's hooks on it may
# reference the whole model.
_decided: weakref.WeakKeyDictionary[torch.nn.Module, tuple[_Head, LossPath]] = (
    weakref.WeakKeyDictionary()
)


def decide_loss_path(
    model: torch.nn.Module, input_ids: torch.Tensor | None, wanted: str = "auto"
) -> LossPath:
    """The fastest path that is proven to give this model's loss; decided once, then cached.

    The proof is three forwards of sixteen tokens in eval mode without a gradient. The random state
    and the model's modes are restored. Every process must call this: engines that shard weights
    gather them here too.

    Args:
        model: with or without the engine's wrapper.
        input_ids: any tokens of the model, int64, on its device; used by the first call only.
        wanted: `auto`, or `off` to take the plain path from now on.
    """
    inner, head, reason = _find_head(model)
    if head is None:
        return LossPath(PLAIN, reason)
    if wanted == "off":
        _remember(inner, head, LossPath(PLAIN, "asked for"))
    return _decide(inner, head, input_ids)


def set_loss_path(model: torch.nn.Module, path: LossPath) -> None:
    """Take `path` for this model from now on, without a proof; for comparing paths.

    Raises:
        ValueError: the model has no output head that can be replaced.
    """
    inner, head, reason = _find_head(model)
    if head is None:
        raise ValueError(reason)
    _remember(inner, head, path)


def summed_loss(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    targets: torch.Tensor,
    label_smoothing: float,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `model` on `inputs` and sum the cross-entropy of `targets`, on the path decided for it.

    Args:
        targets: the token that each position predicts, -100 for none, shape (samples, tokens),
            int64.
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.
        positions: indices into the flattened targets that have one, if known, ascending, int64.

    Returns:
        A scalar, float32 or float64; it has a graph even if there is no target.

    Raises:
        DataError: the model does not return one row of logits per label.
    """
    inner, head, _ = _find_head(model)
    path = PLAIN if head is None else _decide(inner, head, inputs.get("input_ids")).path
    if head is None or path == PLAIN:
        return aligned_loss(_logits(model(**inputs)), targets, label_smoothing)
    patched = PatchedHead(head, path, targets, label_smoothing, positions)
    with patched.in_place():
        logits = _logits(model(**inputs))
    return patched.loss_of(logits)


def logits_at(
    model: torch.nn.Module, inputs: Mapping[str, Any], positions: torch.Tensor
) -> torch.Tensor:
    """Run `model` on one row; return its logits at `positions`, shape (positions, vocabulary).

    Only these logits are computed if a path is proven for the model.

    Args:
        inputs: `input_ids` of shape (1, tokens), and the model's other inputs.
        positions: ascending, int64.
    """
    inner, head, _ = _find_head(model)
    path = PLAIN if head is None else _decide(inner, head, inputs["input_ids"]).path
    if head is None or path == PLAIN:
        return _logits(model(**inputs))[0, positions]
    targets = torch.full_like(inputs["input_ids"], IGNORE)
    targets[0, positions] = 0
    patched = PatchedHead(head, SELECTED, targets, 0.0)
    with patched.in_place():
        logits = _logits(model(**inputs))
    return logits[0] if patched.path == SELECTED else logits[0, positions]


def _logits(outputs: Any) -> torch.Tensor:
    logits: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs
    return logits


# --- the decision ---


def _decide(
    inner: torch.nn.Module, head: torch.nn.Module, input_ids: torch.Tensor | None
) -> LossPath:
    known = _decided.get(inner)
    if known is not None and known[0]() is head:
        return known[1]
    if input_ids is None or input_ids.numel() == 0:
        return LossPath(PLAIN, "a batch without input_ids cannot prove another path")
    return _remember(inner, head, _prove(inner, head, input_ids))


def _remember(inner: torch.nn.Module, head: torch.nn.Module, path: LossPath) -> LossPath:
    _decided[inner] = (weakref.ref(head), path)
    return path


def _find_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module | None, str]:
    """(the model inside the engine's wrapper, its output head or None, why there is none)."""
    inner = inside_wrapper(model)
    if is_compiled(inner):
        return inner, None, "the model is compiled together with its output head"
    try:
        head = inner.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, torch.nn.Module):
        return inner, None, f"{type(inner).__name__} names no output head (get_output_embeddings)"
    if is_compiled(head):
        return inner, None, "the output head is compiled"
    return inner, head, ""


# --- the proof ---


def _prove(model: torch.nn.Module, head: torch.nn.Module, input_ids: torch.Tensor) -> LossPath:
    """Compare the paths on sixteen tokens. All paths always run, so that processes stay in step."""
    ids = input_ids.flatten()[:16]
    ids = ids.repeat(16)[:16].view(2, 8)
    targets = ids.flip(1).clone()  # not what a trained model expects, so that no loss is nearly 0
    targets[0, :3] = targets[1, 5:] = IGNORE
    is_linear = type(head).forward is torch.nn.Linear.forward and "forward" not in head.__dict__
    selected = PatchedHead(head, SELECTED, targets, 0.0)
    chunked = PatchedHead(head, CHUNKED if is_linear else SELECTED, targets, 0.0, proving=True)
    try:
        with undisturbed(model, input_ids.device):
            exact = cross_entropy(_logits(model(input_ids=ids)), targets, 0.0)
            with selected.in_place():
                found = _logits(model(input_ids=ids))
            with chunked.in_place():
                returned = _logits(model(input_ids=ids))
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except Exception as error:  # of any type: the model's own code cannot run on tokens alone
        words = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return LossPath(PLAIN, f"the model cannot be probed: {words}")
    if selected.path == PLAIN:
        return LossPath(
            PLAIN, "the output head is not run on hidden states of shape (samples, tokens, hidden)"
        )
    if found.shape[:-1].numel() != len(selected.chosen) or not _agree(
        selected.loss_of(found), exact, selected.dtype
    ):
        return LossPath(PLAIN, "the logits at the targets alone give another loss")
    if selected.dtype == torch.float16:
        return LossPath(SELECTED, "in float16 the loss scale must reach the logits' gradient")
    if not is_linear:
        return LossPath(
            SELECTED, f"the output head ({type(head).__name__}) is not run as a plain linear layer"
        )
    assert chunked.given is not None and chunked.found is not None
    if not _is_same(returned, chunked.given):
        return LossPath(SELECTED, "the model changes its logits after the output head")
    if not _agree(chunked.found, exact, chunked.dtype):
        return LossPath(SELECTED, "the output head does more than apply its weight and bias")
    return LossPath(CHUNKED, "proven on this model")


def _agree(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    if not has_values(exact):
        return True
    tolerance = TOLERANCE_16_BIT if dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    return bool((found - exact).abs() <= tolerance * exact.abs())


def _is_same(logits: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether `logits` are `given`, untouched: a factor that is 1 now may be trained."""
    # Not by data_ptr(), which is 0 for every tensor without values.
    storage, given_storage = (StorageWeakRef(t.untyped_storage()) for t in (logits, given))
    return storage == given_storage and logits.shape == given.shape and version_of(given) == 0
