"""Attention for packed rows that computes no pair of tokens of different samples.

transformers' `sdpa` computes all pairs of a packed row and masks those of different samples: K
samples of length L cost (K L)^2 instead of K L^2. Here each sample is attended to by itself: in 16
bits on a GPU by torch's kernel for sequences of several lengths, `varlen_attn`, else by
`scaled_dot_product_attention` on one sample after the other. Registered with transformers under the
name `PACKED_SDPA`; a batch that is not packed takes transformers' own path. Knows transformers'
interfaces, and no model, window or configuration.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, PACKED_SDPA = "sdpa", "packed_sdpa"
# What other kinds of attention do to the scores.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")
_16_BIT = (torch.float16, torch.bfloat16)
# torch 2.11 has no grouped heads there.
_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


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
    """For a packed row its samples: their lengths, shape (samples,), int64, on the CPU, or for
    `varlen_attn` their `_ends`. Else transformers' mask for `sdpa`. The arguments are
    transformers'."""
    is_one_row = batch_size == 1 and q_length == kv_length and not (q_offset or kv_offset)
    # transformers asks for the mask itself where it found positions that restart.
    if is_one_row and attention_mask is None and not allow_is_causal_skip and not use_vmap:
        lengths = _lengths(mask_function, q_length, device)
        if lengths is not None:
            return _ends(lengths, device) if has_varlen(device, options.get("dtype")) else lengths
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


def has_varlen(device: torch.device | str, dtype: torch.dtype | None) -> bool:
    """Whether attention of this device and number format runs as `varlen_attn`: in 16 bits, by
    itself or under autocast, on a GPU of compute capability 8.0 or above."""
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return _dtype_of("cuda", dtype) in _16_BIT


def _dtype_of(kind: str, dtype: torch.dtype | None) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def _ends(lengths: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """What `varlen_attn` needs in one tensor, so that compiled code sees tensors and sizes only:
    where samples begin and the last ends, int32, in each of as many equal rows as the longest
    sample has tokens. The rows share their memory."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if torch.device(device).type == "cuda":
        ends = ends.pin_memory()  # else the copy waits
    return ends.to(device, non_blocking=True).expand(int(lengths.numpy().max()), -1)


def _lengths(
    mask_function: Any, num_tokens: int, device: torch.device | str
) -> torch.Tensor | None:
    """The lengths of the samples, or None if attention inside one of them is more than causal.

    transformers' masks are rules over two positions. A token that does not see the one before it
    begins a sample. A sample's attention is causal if no token sees the next and its last sees them
    all, which a sliding window or a chunk smaller than the sample forbids.
    """
    at = torch.arange(num_tokens, device=device)
    none = at.new_zeros(1)  # an index of no dimension would be read on the host

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(mask_function(none, none, queries, keys), device=device)

    begins = torch.ones_like(at, dtype=torch.bool)
    begins[1:] = ~sees(at[1:], at[:-1])
    sample = begins.cumsum(0)
    last = torch.searchsorted(sample, sample, right=True) - 1
    is_more = sees(at[:-1], at[1:]).any() | ~sees(last, at).all()
    # One copy to the host, for which it waits once.
    found = torch.cat([begins, is_more[None]]).cpu().numpy()
    if found[-1]:
        return None
    return torch.from_numpy(np.diff(np.flatnonzero(found[:-1]), append=num_tokens))


def _is_of_samples(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether `mask` made it for a packed row. Masks of other kinds are bool or floating point, of
    any number of dimensions: a model may hand its own to attention."""
    return mask is not None and (mask.dtype, mask.ndim) in ((torch.int64, 1), (torch.int32, 2))


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
    if not _is_of_samples(attention_mask):
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
    if attention_mask.ndim == 2 and not dropout:  # its kernel knows no dropout
        dtype = _dtype_of(query.device.type, query.dtype)
        if dtype in _16_BIT:
            # As autocast does for torch's own attention: rotated queries are in float32.
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
            return _all_at_once(query, key, value, attention_mask, scaling), None
    lengths = attention_mask if attention_mask.ndim == 1 else attention_mask[0].diff()
    return _each_by_itself(query, key, value, lengths.tolist(), dropout, scaling), None


def _all_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention inside each sample, shape (1, tokens, heads, size), by one kernel."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _GROUPS_HEADS:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    options: dict[str, Any] = {"enable_gqa": True} if groups > 1 and _GROUPS_HEADS else {}
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    begins, longest = ends[0], ends.shape[0]
    found: Any = varlen_attn(
        query,
        key,
        value,
        begins,
        begins,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    return found[None]


@torch.compiler.disable  # every other set of lengths would be compiled anew
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
