"""Attention for packed rows that computes no pair of tokens of different samples.

transformers' `sdpa` computes all pairs of a packed row and masks those of different samples: K
samples of length L cost (K L)^2 instead of K L^2. Here torch's attention runs on each sample by
itself. Registered with transformers under the name `PACKED_SDPA`; a batch that is not packed takes
transformers' own path. Knows transformers' interfaces, and no model, window or configuration.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, PACKED_SDPA = "sdpa", "packed_sdpa"
# What other kinds of attention do to the scores.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")


def register() -> None:
    """Make `PACKED_SDPA` known to transformers."""
    AttentionInterface.register(PACKED_SDPA, attention)
    AttentionMaskInterface.register(PACKED_SDPA, mask)


def attend_inside_samples(model: Any) -> bool:
    """Switch a model that runs `sdpa` to `PACKED_SDPA`; False if it runs anything else."""
    used = {
        getattr(getattr(module, "config", None), "_attn_implementation", None)
        for module in model.modules()
    }
    if used - {None} != {SDPA}:
        return False
    register()
    model.set_attn_implementation(PACKED_SDPA)
    return bool(model.config._attn_implementation == PACKED_SDPA)  # noqa: SLF001 - no public name


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """For a packed row the lengths of its samples, shape (samples,), int64, on the CPU; else
    transformers' mask for `sdpa`. The arguments are transformers'."""
    is_one_row = batch_size == 1 and q_length == kv_length and not (q_offset or kv_offset)
    # transformers asks for the mask itself where it found positions that restart.
    if is_one_row and attention_mask is None and not allow_is_causal_skip and not use_vmap:
        lengths = _lengths(mask_function, q_length, device)
        if lengths is not None:
            return lengths
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **options,
    )


def _lengths(
    mask_function: Any, num_tokens: int, device: torch.device | str
) -> torch.Tensor | None:
    """The lengths of the samples, or None if attention inside one of them is more than causal.

    transformers' masks are rules over two positions. A token that does not see the one before it
    begins a sample. A sample's attention is causal if no token sees the next and its last sees them
    all, which a sliding window or a chunk smaller than the sample forbids.
    """
    at = torch.arange(num_tokens, device=device)
    none = torch.zeros((), dtype=at.dtype, device=device)

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(mask_function(none, none, queries, keys), device=device)

    begins = torch.cat([at[:1], at[1:][~sees(at[1:], at[:-1])]])
    lengths = torch.diff(begins, append=at.new_tensor([num_tokens]))
    last = (begins + lengths - 1).repeat_interleave(lengths)
    if bool(sees(at[:-1], at[1:]).any() | ~sees(last, at).all()):
        return None
    return lengths.cpu()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (batch, heads, tokens, size) to (batch, tokens, heads,
    size).

    Args:
        attention_mask: as `mask` gave it.

    Raises:
        ValueError: the model's attention is not plain causal attention on this packed row.
    """
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(
            f"{PACKED_SDPA} computes plain causal attention, and {type(module).__name__} asks for "
            f"{', '.join(unknown) or 'attention to later tokens'}"
        )
    lengths = attention_mask.tolist()
    return _each_by_itself(query, key, value, lengths, dropout, scaling), None


@torch.compiler.disable  # compiled, every other set of lengths would be compiled anew
def _each_by_itself(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention inside each sample, shape (1, tokens, heads, size)."""
    # Neighbours of one length are a batch. A window's samples are sorted by length, so it is large.
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    # Unlike slices, the parts of a split are put together by one copy in the backward.
    sizes = [length * number for length, number in runs]
    parts = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outputs = [
        scaled_dot_product_attention(
            _batched(q, *run),
            _batched(k, *run),
            _batched(v, *run),
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for run, q, k, v in zip(runs, *parts, strict=True)
    ]
    return torch.cat([_flat(output) for output in outputs], dim=1)


def _batched(tensor: torch.Tensor, length: int, number: int) -> torch.Tensor:
    """(1, heads, number * length, size) to (number, heads, length, size)."""
    if number == 1:
        return tensor
    return tensor[0].unflatten(1, (number, length)).transpose(0, 1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(number, heads, length, size) to (1, number * length, heads, size)."""
    return tensor.transpose(1, 2).flatten(0, 1)[None]
