"""Floating-point operations that a model's training needs, for the utilisation of the device.

The count is that of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): 6 N per token for
the matmul weights (2 forward, 2 for the gradient of the input, 2 for that of the weight), and
12 L H Q T for the attention of T tokens (L layers, H heads of Q numbers), whether or not a mask
hides half of it. Only useful work counts: no padding, no recomputed forward, and the output head at
the targets only. Knows no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Multiply-adds of two operations each: forward, gradient of the input, gradient of the weight.
_TRAINED, _FROZEN = 6, 4
# Names in configurations: experts per layer, and how many of them a token goes through.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of forward and backward.

    Attributes:
        per_token: of one token without padding, its attention included.
        per_target: of one target in the output head.
    """

    per_token: float
    per_target: float

    def of(self, num_tokens: float, num_targets: float) -> float:
        """Of a window with these numbers of tokens and targets."""
        return num_tokens * self.per_token + num_targets * self.per_target


def training_flops(model: Any, lengths: np.ndarray) -> TrainingFlops:
    """The operations that training `model` needs.

    A frozen weight (LoRA's base model) needs no gradient of its own: 4 N. Of a mixture of experts,
    those count that one token goes through. An embedding is looked up, not multiplied.

    Args:
        model: unwrapped; sharded weights count whole.
        lengths: tokens of each sample of the data, shape (samples,): attention grows with them.
            A window is taken to be a fair share of the data.
    """
    head = _head_of(model)
    share = _share_of_experts(_text_config(model))
    per_token = per_target = 0.0
    seen: set[tuple[int, bool]] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            if (key := (id(weight), module is head)) in seen:
                continue  # one layer that is reached by two names
            seen.add(key)
            flops = (_TRAINED if weight.requires_grad else _FROZEN) * _size(module, weight)
            if module is head:
                per_target += flops
            else:
                per_token += flops * (share if len(_shape(weight)) == 3 else 1.0)
    return TrainingFlops(per_token + _attention_per_token(model, lengths), per_target)


def _size(module: torch.nn.Module, weight: torch.Tensor) -> int:
    """Numbers of `weight` that a token is multiplied with; 0 for biases and norms."""
    if isinstance(module, torch.nn.Linear) and module.bias is not weight:
        return module.in_features * module.out_features  # a quantised one is stored packed
    shape = _shape(weight)
    return int(np.prod(shape)) if len(shape) > 1 else 0


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    # ZeRO-3 leaves a placeholder and notes the shape.
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _head_of(model: Any) -> torch.nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # An adapter may wrap it: its own layers then count as the model's.
    return getattr(head, "base_layer", head)


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first_number(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _share_of_experts(config: Any) -> float:
    """The share of fused expert weights that one token goes through; 1 without experts."""
    experts, chosen = _first_number(config, _EXPERTS), _first_number(config, _CHOSEN)
    return chosen / experts if experts and chosen else 1.0


def _attention_per_token(model: Any, lengths: np.ndarray) -> float:
    """12 H Q (keys per token), summed over the layers that have attention; 0 if the model's
    configuration does not say."""
    config = _text_config(model)
    layers, heads, hidden = (
        _first_number(config, (name,))
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not layers or not heads or not hidden or not len(lengths):
        return 0.0
    queries = _first_number(config, ("qk_head_dim", "head_dim")) or hidden // heads
    values = _first_number(config, ("v_head_dim",)) or queries
    tokens = np.asarray(lengths, dtype=np.float64)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    total = 0.0
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            continue  # linear in the length: its products are weights, counted above
        keys = tokens
        if kind == "sliding_attention" and isinstance(window, int):
            keys = np.minimum(tokens, window)
        # The mean over tokens, not over samples: a long sample has more of them.
        total += 6 * heads * (queries + values) * float((tokens * keys).sum() / tokens.sum())
    return total
