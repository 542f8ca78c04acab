"""A model without memory: its sizes, and what one micro-batch's forward and backward allocate.

The model's own code runs on torch's fake tensors, which have shapes and no memory. All that it
keeps for the backward is seen (a fused attention's softmax statistics, a checkpointed layer's
input), so no architecture needs its own formula. Closed forms for plain transformers exist
(Korthikanti et al. 2022, arXiv:2205.05198, section 4: 34 bytes per token, hidden unit and layer of
a 16-bit GPT, plus the attention matrix that a fused attention never stores); this module does not
use them. Knows no engine.
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
from accum_trainer.lm.offloading import offload_block_inputs
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.losses.head import decide_loss_path

LAYERS_FORWARD, HEAD, FIRST_BACKWARD, LAYERS_BACKWARD = PHASES = range(4)
# ZeRO-3 keeps parameters of at most this many numbers whole on every process
# (stage3_param_persistence_threshold).
PERSISTENT = 100_000
# The operator of a dtype cast.
_TO_COPY = torch.ops.aten._to_copy.default  # noqa: SLF001 - its name in the dispatcher


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, in parameters.

    Attributes:
        parameters, trained: all, and those that get gradients.
        largest, widest: the largest trained tensor, and the largest of all.
        persistent: in tensors of at most PERSISTENT numbers.
        block, block_trained: the largest block that is sharded as one (`_no_split_modules`); 0 if
            the model names none.
        outside: in no block: embeddings, last norm, output head.
        head: of the output head, if it is trained and not tied to the embedding.
        layers, hidden_size, vocabulary: from the model's configuration, for display; None if it
            lacks them.
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
class Allocated:
    """Memory in use after one operation, weights aside, in bytes.

    Attributes:
        phase: LAYERS_FORWARD, HEAD (output head and loss, both ways), FIRST_BACKWARD (of the last
            layer, when most is kept) or LAYERS_BACKWARD (of the others).
        activations: everything that is neither weight nor finished gradient.
        copies: the share of `activations` that is autocast's 16-bit copies of weights.
        gradients: finished gradients, in the weights' dtype.
    """

    phase: int
    activations: int
    copies: int
    gradients: int


class Trace:
    """One micro-batch's forward and backward, operation by operation.

    Attributes:
        offloaded: bytes that wait on the host for the backward.
    """

    def __init__(self, states: list[Allocated], offloaded: int) -> None:
        self._states = states
        self.offloaded = offloaded

    def peak(self, *phases: int, kept: float = 0.0) -> int:
        """Most bytes in these phases (default: all), with `kept` bytes for each byte of finished
        gradient."""
        chosen = [s for s in self._states if not phases or s.phase in phases]
        return max((int(s.activations + kept * s.gradients) for s in chosen), default=0)

    @property
    def copies(self) -> int:
        """Bytes of 16-bit copies of weights at the peak."""
        return max(self._states, key=lambda s: s.activations).copies


def model_shapes(config: TrainConfig) -> Shapes:
    """Sizes of `config.model`, adapters included, without allocating it; ConfigError if it cannot
    be found."""
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
        Exception: of any type, if the model's code needs values, not only shapes (a router that
            picks experts, say).
    """
    model = _weightless(config)
    away: list[int] = []  # bytes that left the device
    if config.activation_offload:
        offload_block_inputs(model, partial(_shape_alone, away), _of_shape)
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
        return Trace(recorder.states, sum(away))


def _weightless(config: TrainConfig) -> Any:
    with _quiet(), torch.device("meta"):
        return shape_of_model(config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence fake tensors, which log a traceback before they raise, and libraries' warnings about
    choices that are ours."""
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
    text_config = model.config.get_text_config()
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
        layers=getattr(text_config, "num_hidden_layers", None),
        hidden_size=getattr(text_config, "hidden_size", None),
        vocabulary=getattr(text_config, "vocab_size", None),
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
    """Replace the model's weights with fake CPU tensors in `dtype`; buffers keep their dtype, as in
    the engines."""
    made: dict[torch.Tensor, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            made.setdefault(
                p, torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
            )
            setattr(module, name, made[p])
        for name, b in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))


def _shape_alone(away: list[int], tensor: torch.Tensor) -> tuple[Any, ...]:
    """What is left of a tensor that leaves the device; its bytes are added to `away`, as many as
    torch pins for it: a power of two."""
    away.append(1 << (tensor.nbytes - 1).bit_length())
    return tensor.shape, tensor.stride(), tensor.dtype


def _of_shape(kept: tuple[Any, ...]) -> torch.Tensor:
    """One that comes back."""
    shape, strides, dtype = kept
    return torch.empty_strided(shape, strides, dtype=dtype)


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
    """Make the model's scaled-dot-product attention run with a padding mask, or without one.

    transformers decides by the mask's values, which fake tensors lack. An attention registered
    without a mask function gets no mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    # transformers has no public name for the attention in force.
    if model.config._attn_implementation != "sdpa":  # noqa: SLF001
        return

    def attention(*args: Any, **kwargs: Any) -> Any:
        if not keeps_dropout:
            kwargs["dropout"] = 0.0
        return sdpa_attention_forward(*args, **kwargs)

    name = f"accum_trainer_{'masked' if masked else 'causal'}"
    AttentionInterface.register(name, attention)
    if masked:
        AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name  # noqa: SLF001 - see above


def _address(storage: Any) -> int:
    """Identifies a storage; fake ones have no data pointer."""
    return storage._cdata  # noqa: SLF001 - torch has no public name for it


class _Recorder(TorchDispatchMode):
    """Sums the live storages by kind after each operation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.states: list[Allocated] = []
        self._phase, self._activations, self._copies, self._gradients = LAYERS_FORWARD, 0, 0, 0
        # Of each live storage: its bytes, and whether it is a copy of a weight.
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._weights = {
            _address(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())
        }
        self._last_block: torch.nn.Module | None = None
        self._finished: list[Any] = []  # keeps gradients alive so that no address is reused
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
        is_copy = func is _TO_COPY and _address(args[0].untyped_storage()) in self._weights
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), is_copy)
        return outputs

    def _see(self, storage: Any, is_copy: bool) -> None:
        address = _address(storage)
        if address in self._sizes or address in self._weights:
            return
        self._sizes[address] = storage.nbytes(), is_copy
        self._add(storage.nbytes(), is_copy)
        weakref.finalize(storage, self._forget, address)
        self._record()

    def _forget(self, address: int) -> None:
        size, is_copy = self._sizes.pop(address, (0, False))
        self._add(-size, is_copy)

    def _add(self, size: int, is_copy: bool) -> None:
        self._activations += size
        self._copies += size if is_copy else 0

    def _finish(self, block: torch.nn.Module | None, parameter: torch.Tensor) -> None:
        """Count a parameter's finished gradient as such from here on."""
        if block is not None:
            self._last_block = self._last_block or block
            self._enter(FIRST_BACKWARD if block is self._last_block else LAYERS_BACKWARD)
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        size = storage.nbytes()
        self._forget(_address(storage))
        self._weights.add(_address(storage))
        self._finished.append(storage)
        self._gradients += size
        self._record()

    def _enter(self, phase: int) -> None:
        self._phase = phase

    def _record(self) -> None:
        self.states.append(Allocated(self._phase, self._activations, self._copies, self._gradients))
