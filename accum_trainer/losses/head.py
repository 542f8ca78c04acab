"""Logits only where there are targets: the same loss and gradient for less work and memory, for any
model of transformers.

A causal model ends in its output head, hidden states to logits, the largest tensor there is; but
prompts and padding have no target, and what is wanted is one number. While the model runs, another
forward stands in for its head's, inside whatever wraps the model:

    chunked     keeps the positions that have a target, makes their logits CHUNK numbers at a time,
                and gives their summed loss in place of the logits; for a linear head whose output
                is the model's
    selected    gives the logits of these positions; if the model works on its logits (Gemma-2's
                soft cap) or the head is no plain linear layer (LoRA on it)
    plain linear layer (LoRA on it)
    plain       leaves the head alone

One forward of the head in each, so processes that gather weights or exchange gradients do it
equally often. Which path holds is proven on the model itself, once. Knows no model, no engine and
no window.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from accum_trainer.batch import IGNORE
from accum_trainer.errors import DataError

CHUNKED, SELECTED, PLAIN = "chunked", "selected", "plain"
# Most logits at a time: 128 MiB in float32, held twice. Measured on a CPU with a vocabulary of
# 49,152 and 960 targets: chunks of a quarter cost 6 % more time in head and loss, larger ones save
# nothing.
CHUNK = 2**25
# What the paths may differ by on the probe, relative; 16-bit logits are rounded anew in each shape
# of a product.
TOLERANCE, TOLERANCE_16_BIT = 1e-5, 1e-2
# Classes of these modules run their `module` and hand on what it gives; to prove a path they need
# not take part.
_WRAPPERS = ("torch.nn.parallel.distributed", "deepspeed.runtime.engine")


@dataclass(frozen=True)
class LossPath:
    """How a model's loss is made.

    Attributes:
        path: `chunked`, `selected` or `plain`.
        reason: why it is this one.
    """

    path: str
    reason: str

    @property
    def note(self) -> str | None:
        """What a person should know before training, where not everything is saved that could
        be."""
        return None if self.path == CHUNKED else f"loss path {self.path}: {self.reason}"


# By model, with the head that it was decided for: a new head (a resized or adapted one), or another
# model around the same head, is proven anew.
_Head = weakref.ReferenceType[torch.nn.Module]
_decided: weakref.WeakKeyDictionary[torch.nn.Module, tuple[_Head, LossPath]] = (
    weakref.WeakKeyDictionary()
)


def decide_loss_path(
    model: torch.nn.Module, input_ids: torch.Tensor | None, wanted: str = "auto"
) -> LossPath:
    """The fastest path that is proven to give this model's loss; decided once, then looked up.

    The proof is three forwards of sixteen tokens in eval mode without a gradient; the random state
    and the model's modes are left as they were. Every process must call it: one that gathers
    weights gathers them here too.

    Args:
        model: as the engine wrapped it, or plain.
        input_ids: any tokens of the model, int64, where it is; looked at the first time only.
        wanted: `auto`; or `off`, for the plain path from here on.
    """
    inner, head, reason = _find_head(model)
    if head is None:
        return LossPath(PLAIN, reason)
    if wanted == "off":
        _remember(inner, head, LossPath(PLAIN, "asked for"))
    return _decide(inner, head, input_ids)


def summed_loss(
    model: torch.nn.Module, inputs: Mapping[str, Any], targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Run `model` on `inputs` and sum the cross-entropy of `targets`, on the path that is decided
    for it.

    Args:
        targets: the token that each position predicts, -100 for none, shape (samples, tokens),
            int64.

    Returns:
        A scalar, float32 or float64, with a graph also where there is no target.
    """
    inner, head, _ = _find_head(model)
    path = PLAIN if head is None else _decide(inner, head, inputs.get("input_ids")).path
    if head is None or path == PLAIN:
        return _aligned_loss(_logits(model(**inputs)), targets, label_smoothing)
    stand_in = PatchedHead(head, path, targets, label_smoothing)
    with stand_in.in_place():
        logits = _logits(model(**inputs))
    return stand_in.loss_of(logits)


def logits_at(
    model: torch.nn.Module, inputs: Mapping[str, Any], positions: torch.Tensor
) -> torch.Tensor:
    """Run `model` on one row and give its logits at some positions, shape (positions, vocabulary).

    Only these logits are made if a path is proven for the model.

    Args:
        inputs: `input_ids` of shape (1, tokens), and whatever else the model takes.
        positions: ascending, int64.
    """
    inner, head, _ = _find_head(model)
    path = PLAIN if head is None else _decide(inner, head, inputs["input_ids"]).path
    if head is None or path == PLAIN:
        return _logits(model(**inputs))[0, positions]
    targets = torch.full_like(inputs["input_ids"], IGNORE)
    targets[0, positions] = 0
    stand_in = PatchedHead(head, SELECTED, targets, 0.0)
    with stand_in.in_place():
        logits = _logits(model(**inputs))
    return logits[0] if stand_in.path == SELECTED else logits[0, positions]


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Summed cross-entropy in float32 (float64 from float64 logits); targets of -100 count
    nothing."""
    flat = logits.flatten(0, -2)
    return F.cross_entropy(
        flat if flat.dtype == torch.float64 else flat.float(),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def _aligned_loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Raises DataError if the model does not give the logits of each label's own position."""
    if logits.shape[:-1] != targets.shape:
        raise DataError(
            f"causal_lm_loss got labels of shape {tuple(targets.shape)}, and the model gave logits "
            "of "
            f"shape {tuple(logits.shape)}: they are not of the same positions. Pass "
            "model(**batch).loss to acc.backward() instead"
        )
    return cross_entropy(logits, targets, label_smoothing)


def _logits(outputs: Any) -> torch.Tensor:
    return outputs.logits if hasattr(outputs, "logits") else outputs


# --- the head of a model ---


def _decide(
    inner: torch.nn.Module, head: torch.nn.Module, input_ids: torch.Tensor | None
) -> LossPath:
    known = _decided.get(inner)
    if known is not None and known[0]() is head:
        return known[1]
    if input_ids is None or input_ids.numel() == 0:
        return LossPath(PLAIN, "a batch without input_ids has nothing to prove another path with")
    return _remember(inner, head, _prove(inner, head, input_ids))


def _remember(inner: torch.nn.Module, head: torch.nn.Module, path: LossPath) -> LossPath:
    _decided[inner] = (
        weakref.ref(head),
        path,
    )  # weakly: an engine's hooks on the head hold the whole model
    return path


def inside_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside the engine's wrapper."""
    inner = model
    while not is_compiled(inner) and type(inner).__module__.startswith(_WRAPPERS):
        inner = inner.module  # type: ignore[assignment]
    return inner


def _find_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module | None, str]:
    """(the model inside the engine's wrapper, its output head or None, why there is none)."""
    inner = inside_wrapper(model)
    if is_compiled(inner):
        return inner, None, "the model is compiled, with its head as it was"
    try:
        head = inner.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, torch.nn.Module):
        return inner, None, f"{type(inner).__name__} names no output head (get_output_embeddings)"
    if is_compiled(head):
        return inner, None, "the output head is compiled"
    return inner, head, ""


def is_compiled(module: Any) -> bool:
    """Whether torch compiled this module, or its call: hooks that are put on it later may not
    run."""
    return (
        "_orig_mod" in getattr(module, "_modules", ())
        or getattr(module, "_compiled_call_impl", None) is not None
    )


class PatchedHead:
    """The forward that takes the place of the head's during one call of the model.

    Attributes:
        path: what it did: the path wanted; `selected` where that is safer; `plain` where it was not
            run on (samples, tokens, hidden).
        dtype: that the logits were computed in.
        found: the loss, on the chunked path.
        given: what the model got for logits.
    """

    def __init__(
        self,
        head: torch.nn.Module,
        wanted: str,
        targets: torch.Tensor,
        label_smoothing: float,
        proving: bool = False,
    ) -> None:
        self._head, self._wanted, self._proving = head, wanted, proving
        self._targets, self._label_smoothing = targets, label_smoothing
        self._positions = _positions(
            targets
        )  # before the forward: a GPU is waited for where it has least to do
        self.path = PLAIN
        self.dtype = torch.float32
        self.found: torch.Tensor | None = None
        self.given: torch.Tensor | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        # In the instance, not as a hook: the engines' hooks gather the head's weights around
        # whatever its forward is.
        own = self._head.__dict__
        before = own.get("forward")
        self._forward = self._head.forward
        own["forward"] = self
        try:
            yield
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != self._targets.shape:
            return self._forward(*args, **kwargs)
        self.dtype = _compute_dtype(hidden, getattr(self._head, "weight", hidden))
        # In float16 the gradient of the logits must be made with the loss scale, which is not known
        # yet.
        is_chunked = self._wanted == CHUNKED and self.dtype != torch.float16
        self.path = CHUNKED if is_chunked else SELECTED
        positions = self._positions.to(hidden.device)
        if not is_chunked and len(positions) == 0:
            positions = positions.new_zeros(
                1
            )  # without a target, but it keeps every parameter in the graph
        self._chosen = self._targets.flatten().to(hidden.device)[positions]
        kept = hidden.flatten(0, -2).index_select(0, positions)
        if is_chunked:
            self.found = _chunked_loss(
                kept, self._head, self._chosen, self._label_smoothing, self.dtype
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
        """The loss, from what the model gave for logits."""
        if self.path == CHUNKED:
            # of one number, and no view of it: FSDP2 warns of views, and a view cannot be detached
            return logits.sum()
        if self.path == PLAIN:
            return _aligned_loss(logits, self._targets, self._label_smoothing)
        return cross_entropy(logits, self._chosen, self._label_smoothing)


def _positions(targets: torch.Tensor) -> torch.Tensor:
    """Places in the flattened `targets` that have one; all of them where these have no values, only
    shapes."""
    if not _has_values(targets):
        return torch.arange(targets.numel(), device=targets.device)
    return (targets.flatten() != IGNORE).nonzero().squeeze(1)


def _has_values(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer here computes in."""
    device = hidden.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


# --- the proof ---


def _prove(model: torch.nn.Module, head: torch.nn.Module, input_ids: torch.Tensor) -> LossPath:
    """Compare the paths on sixteen tokens, each path run whatever another gave: processes stay in
    step."""
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
                handed_on = _logits(model(input_ids=ids))
    except torch.OutOfMemoryError:
        raise  # nothing about the model
    except (
        Exception
    ) as error:  # of any type: it is the model's own code that cannot run on tokens alone
        return LossPath(
            PLAIN, f"the model cannot be probed: {type(error).__name__}: {str(error).strip()[:200]}"
        )
    if selected.path == PLAIN:
        return LossPath(
            PLAIN, "the output head is not run on hidden states of shape (samples, tokens, hidden)"
        )
    if found.shape[:-1].numel() != len(selected._chosen) or not _agree(
        selected.loss_of(found), exact, selected.dtype
    ):
        return LossPath(PLAIN, "logits at the targets alone give another loss")
    if selected.dtype == torch.float16:
        return LossPath(SELECTED, "in float16 the loss scale must reach the logits' gradient")
    if not is_linear:
        return LossPath(
            SELECTED, f"the output head ({type(head).__name__}) is not run as a plain linear layer"
        )
    assert chunked.given is not None and chunked.found is not None
    if not _is_same(handed_on, chunked.given):
        return LossPath(SELECTED, "the model works on its logits after the output head")
    if not _agree(chunked.found, exact, chunked.dtype):
        return LossPath(SELECTED, "the output head does more than its weight and bias say")
    return LossPath(CHUNKED, "proven on this model")


def _agree(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    if not _has_values(exact):
        return True
    tolerance = TOLERANCE_16_BIT if dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    return bool((found - exact).abs() <= tolerance * exact.abs())


def _is_same(logits: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether `logits` are `given` and nothing was done to them: a factor that is 1 today may be
    trained to be another."""
    return (
        logits.untyped_storage()._cdata == given.untyped_storage()._cdata
        and logits.shape == given.shape
        and given._version == 0
    )


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and no gradient inside; afterwards each module's mode and the random state as
    before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
        model.eval()
        try:
            yield
        except Exception:
            reset = getattr(model, "reset_iter_state", None)
            if callable(
                reset
                # FSDP2: a forward that did not end leaves weights gathered; the next use of them
                # crashes
            ):
                reset()
            raise
        finally:
            for module, training in modes:
                module.training = training


# --- the loss in chunks ---


def _chunked_loss(
    hidden: torch.Tensor,
    head: Any,
    targets: torch.Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Summed cross-entropy of a linear head's logits, shape (1, 1, 1); hidden (targets, hidden),
    all targets real."""
    tensors = (hidden, head.weight, head.bias)
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    return _ChunkedLoss.apply(*tensors, targets, label_smoothing, dtype, wants)


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is made with the loss, chunk by chunk, while a chunk's logits are there, as
    Liger Kernel does (liger_kernel/ops/fused_linear_cross_entropy.py): for a sum it needs nothing
    from the backward but one factor. Making logits again in the backward took 1.33 times the time.
    With p = softmax(logits) and label smoothing s over V tokens

        loss = -(1 - s) log p[target] - s/V sum(log p)
        d loss / d logits = p - (1 - s) onehot(target) - s/V

    The weight's gradient is added up in float32, whatever dtype the products are computed in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
        wants: list[bool],
    ) -> torch.Tensor:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        vocabulary = weight.shape[0]
        rows = max(1, CHUNK // vocabulary)
        total = hidden.new_zeros((1, 1, 1), dtype=precise)
        gradients = [
            t.new_zeros(t.shape, dtype=precise) if wanted and t is not None else None
            for t, wanted in zip((hidden, weight, bias), wants, strict=True)
        ]
        of_hidden, of_weight, of_bias = gradients
        weight = weight.to(dtype)
        for begin in range(0, len(hidden), rows):
            h, target = (
                hidden[begin : begin + rows].to(dtype),
                targets[begin : begin + rows].unsqueeze(1),
            )
            logits = h @ weight.T
            if bias is not None:
                logits += bias.to(dtype)
            log_p = torch.log_softmax(logits, dim=-1, dtype=precise)
            del logits
            total -= (1 - label_smoothing) * log_p.gather(1, target).sum()
            if label_smoothing:
                total -= label_smoothing / vocabulary * log_p.sum()
            if not any(wants):
                continue
            p = log_p.exp_()
            p.scatter_(1, target, p.gather(1, target) - (1 - label_smoothing))
            if label_smoothing:
                p -= label_smoothing / vocabulary
            p = p.to(dtype)
            if of_hidden is not None:
                of_hidden[begin : begin + rows] = p @ weight
            if of_weight is not None:
                _add_product(of_weight, p.T, h)
            if of_bias is not None:
                of_bias += p.sum(0, dtype=precise)
            del log_p, p
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        # In place, unless the graph is kept for another backward: the weight's gradient is as large
        # as the weight.
        kept, factor = torch._C._autograd._get_current_graph_task_keep_graph(), factor.reshape(())
        of_hidden, of_weight, of_bias = (
            g if g is None else g * factor if kept else g.mul_(factor) for g in ctx.saved_tensors
        )
        return of_hidden, of_weight, of_bias, None, None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
