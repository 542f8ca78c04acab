"""A model without memory: its sizes, and what one micro-batch's forward and backward allocate.

The model's own code runs on torch's fake tensors, which have shapes and no memory: whatever it
keeps for the backward, a fused attention's softmax statistics or a checkpointed layer's input, is
seen, and no architecture needs a formula of its own. Closed forms exist for plain transformers
(Korthikanti et al. 2022, arXiv:2205.05198, section 4: 34 bytes per token, hidden unit and layer of
a 16-bit GPT, plus the attention matrix that a fused attention never stores); they are a check on
this module, not a part of it. Knows no engine.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accum_trainer.config import TrainConfig
from accum_trainer.lm.model import shape_of_model
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.losses.head import decide_loss_path

LAYERS_FORWARD, HEAD, FIRST_BACKWARD, LAYERS_BACKWARD = PHASES = range(4)
# ZeRO-3 keeps parameters of at most so many numbers whole on every process
# (stage3_param_persistence_threshold).
PERSISTENT = 100_000


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, in parameters.

    Attributes:
        parameters, trained: all, and those that get gradients.
        largest, widest: the largest trained tensor, and the largest of all.
        persistent: in tensors of at most PERSISTENT numbers.
        block, block_trained: the largest block that is sharded as one (`_no_split_modules`); 0
            where the model names none.
        outside: in no block: embeddings, last norm, output head.
        head: of the output head, where it is trained and not tied to the embedding.
        layers, hidden_size, vocabulary: as the model's configuration says them, for people; None
            where it does not.
    """

    parameters: int
    trained: int
    largest: int
    widest: int
    persistent: int
    block: int
    block_trained: int
    outside: int
    head: int
    layers: int | None
    hidden_size: int | None
    vocabulary: int | None


@dataclass(frozen=True)
class Moment:
    """What is allocated at one moment beside the weights, in bytes.

    Attributes:
        phase: LAYERS_FORWARD, HEAD (output head and loss, both ways), FIRST_BACKWARD (the last
            layer's, where the most is kept for it) or LAYERS_BACKWARD (the others').
        activations: everything that is neither weight nor finished gradient.
        copies: the part of it that autocast's 16-bit copies of weights are.
        gradients: finished gradients, in the weights' dtype.
    """

    phase: int
    activations: int
    copies: int
    gradients: int


class Trace:
    """One micro-batch's forward and backward, moment by moment."""

    def __init__(self, moments: list[Moment]) -> None:
        self.moments = moments

    def peak(self, *phases: int, kept: float = 0.0) -> int:
        """Most bytes in these phases (in all by default), with `kept` bytes for each byte of
        finished gradient."""
        chosen = [m for m in self.moments if not phases or m.phase in phases]
        return max((int(m.activations + kept * m.gradients) for m in chosen), default=0)

    @property
    def copies(self) -> int:
        """Bytes of 16-bit copies of weights at the peak."""
        return max(self.moments, key=lambda m: m.activations).copies


def model_shapes(config: TrainConfig) -> Shapes:
    """Sizes of `config.model`, its adapters included, with nothing allocated; ConfigError where it
    cannot be found."""
    return _shapes(_weightless(config))


def trace(config: TrainConfig, micro_batch_size: int, precision: str) -> Trace:
    """Run one micro-batch of B samples of max_seq_len tokens without memory.

    Args:
        micro_batch_size: B.
        precision: `float32`; `autocast` (16-bit autocast over float32 weights); or `16-bit`
            (weights too).

    Samples of a micro-batch differ in length, so with B above 1 the attention gets a mask, which
    fused attention keeps as B x S x S numbers per layer; one sample alone needs none. On a GPU
    attention dropout keeps nothing, on a CPU its whole matrix.

    Raises:
        ConfigError: the model cannot be found.
        Exception: of any type, where the model's code asks for values, not only shapes (a router
            that picks experts, say).
    """
    model = _weightless(config)
    _plan_attention(model, masked=micro_batch_size > 1, keeps_dropout=config.cpu)
    with _quiet(), FakeTensorMode():
        _make_fake(model, torch.bfloat16 if precision == "16-bit" else torch.float32)
        if precision == "autocast":
            _autocast(model)
        ids = torch.zeros(micro_batch_size, config.max_seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if micro_batch_size > 1:
            batch["attention_mask"] = torch.ones_like(ids)
        decide_loss_path(model, ids)  # its probe is no part of a micro-batch
        recorder = _Recorder(model)
        with recorder:
            causal_lm_loss(model, batch).backward()
        return Trace(recorder.moments)


def _weightless(config: TrainConfig) -> Any:
    with _quiet(), torch.device("meta"):
        return shape_of_model(config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Fake tensors log a traceback of what they cannot do before they raise it; libraries warn of
    what is ours to decide."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.disabled = before


def _shapes(model: Any) -> Shapes:
    parameters = list(model.parameters())
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    sharded = [list(m.parameters()) for m in model.modules() if type(m).__name__ in blocks]
    largest = max(sharded, key=_numel, default=[])
    said = model.config.get_text_config()
    return Shapes(
        parameters=_numel(parameters),
        trained=_numel(_trained(parameters)),
        largest=max((p.numel() for p in _trained(parameters)), default=0),
        widest=max(p.numel() for p in parameters),
        persistent=_numel([p for p in parameters if p.numel() <= PERSISTENT]),
        block=_numel(largest),
        block_trained=_numel(_trained(largest)),
        outside=_numel(parameters) - sum(map(_numel, sharded)),
        head=_numel(_trained(_head_alone(model))),
        layers=getattr(said, "num_hidden_layers", None),
        hidden_size=getattr(said, "hidden_size", None),
        vocabulary=getattr(said, "vocab_size", None),
    )


def _head_alone(model: Any) -> list[torch.nn.Parameter]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return []
    shared = set(embedding.parameters()) if embedding is not None else set()
    return [p for p in head.parameters() if p not in shared]


def _numel(parameters: list[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _trained(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _make_fake(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have the model's weights be fake tensors of the CPU, in `dtype`; buffers keep their own, as
    in the engines."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(
                    p, torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
                )
                module._parameters[name] = made[p]  # type: ignore[assignment]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _autocast(model: Any) -> None:
    """Wrap the forward as accelerate does: autocast inside, outputs in float32."""
    own = model.forward

    def forward(**batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = own(**batch)
        outputs.logits = outputs.logits.float()
        return outputs

    model.forward = forward


def _plan_attention(model: Any, masked: bool, keeps_dropout: bool) -> None:
    """Have the model's scaled-dot-product attention run with a padding mask or without, whatever
    fake tensors would make of it.

    transformers decides by the mask's values, which fake tensors lack. An attention that is
    registered without a function for masks gets none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return

    def attention(*args: Any, **kwargs: Any) -> Any:
        if not keeps_dropout:
            kwargs["dropout"] = 0.0
        return sdpa_attention_forward(*args, **kwargs)

    name = f"accum_trainer_{'masked' if masked else 'causal'}"
    AttentionInterface.register(name, attention)
    if masked:
        AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name


class _Recorder(TorchDispatchMode):
    """Adds up the storages that live, by what they are, after each operation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self._phase, self._activations, self._copies, self._gradients = LAYERS_FORWARD, 0, 0, 0
        self._sizes: dict[
            int, tuple[int, bool]
        ] = {}  # of storages that live: bytes, and whether it copies a weight
        self._weights = {
            t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())
        }
        self._last_block: torch.nn.Module | None = None
        self._finished: list[Any] = []  # keeps addresses of gradients from being used again
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        block_of = {
            p: m for m in model.modules() if type(m).__name__ in blocks for p in m.parameters()
        }
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(partial(self._finish, block_of.get(p)))
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(lambda *_: self._enter(HEAD))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        is_copy = (
            func is torch.ops.aten._to_copy.default and self._address(args[0]) in self._weights
        )
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), is_copy)
        return outputs

    def _address(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _see(self, storage: Any, is_copy: bool) -> None:
        address = storage._cdata
        if address in self._sizes or address in self._weights:
            return
        self._sizes[address] = storage.nbytes(), is_copy
        self._add(storage.nbytes(), is_copy)
        weakref.finalize(storage, self._forget, address)
        self._note()

    def _forget(self, address: int) -> None:
        size, is_copy = self._sizes.pop(address, (0, False))
        self._add(-size, is_copy)

    def _add(self, size: int, is_copy: bool) -> None:
        self._activations += size
        self._copies += size if is_copy else 0

    def _finish(self, block: torch.nn.Module | None, parameter: torch.Tensor) -> None:
        """A parameter's gradient is whole: it counts apart from here on."""
        if block is not None:
            self._last_block = self._last_block or block
            self._enter(FIRST_BACKWARD if block is self._last_block else LAYERS_BACKWARD)
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        size = storage.nbytes()
        self._forget(storage._cdata)
        self._weights.add(storage._cdata)
        self._finished.append(storage)
        self._gradients += size
        self._note()

    def _enter(self, phase: int) -> None:
        self._phase = phase

    def _note(self) -> None:
        self.moments.append(Moment(self._phase, self._activations, self._copies, self._gradients))
