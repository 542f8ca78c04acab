"""Whether a model keeps packed samples apart, and which inputs it needs for that.

Packed samples lie end to end in one row. transformers separates them in attention by positions
that restart at 0, if there is no cache. Layers with a state, a convolution over time or another
kind of window see the sample before, unless they receive the samples' boundaries and the installed
kernels use them. Nothing is read off a class name: each way is proven on the model
(`packing_proof`). Knows how engines wrap a model (`dry_run`), but no class of model and no window.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from accum_trainer.batch import BOUNDARIES
from accum_trainer.losses.dry_run import inside_wrapper
from accum_trainer.losses.packing_proof import Packing, Proof, accepts

# Fewest tokens of a sample in a proof, unless real ones are shorter.
_FEWEST = 16
_Run = Callable[..., Packing]
# Cache keyed by model, weakly, then by everything else that the outcome depends on.
_decided: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Packing]] = (
    weakref.WeakKeyDictionary()
)


def find_packing(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    *,
    most: int,
    longest: int | None = None,
    boundaries: tuple[str, ...] | None = None,
    is_16_bit: bool = False,
    backward: bool = True,
    agree: Callable[[Packing], Packing] = lambda found: found,
) -> Packing:
    """Prove that the model keeps packed samples apart, or find what it needs; decided once.

    Each way takes six forwards of a row and six small backwards. The random state, the model's
    modes and its buffers are restored, and no parameter gets a gradient.

    Args:
        model: as one process calls it.
        tokens: any tokens of the model, int64, on its device; equal on all processes.
        most: tokens of the longest row to expect; attention windows are exercised up to it.
        longest: tokens of the longest sample to expect, if known.
        boundaries: keys that batches hold besides `position_ids`; None to find the ones needed.
        is_16_bit: the forward runs under 16-bit autocast.
        backward: one process may run a backward without the others. Without it gradients are not
            compared. Logits that do not depend on other samples have no gradient there, so only a
            kernel whose backward contradicts its forward, or a layer behind a weight that is still
            0, could go unnoticed.
        agree: combines the verdicts of all processes into one, so that all try the same ways.
    """
    inner = inside_wrapper(model)
    attention = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    how = (attention, uses_cache(inner), is_16_bit, backward)
    key = (boundaries, *how)
    known = _decided.setdefault(inner, {})
    if key not in known:
        lengths = _lengths(inner, most, longest)
        proof = Proof(model, tokens, lengths, is_16_bit, backward)

        def run(boundaries: tuple[str, ...], use_cache: bool | None = None) -> Packing:
            return agree(proof.run(boundaries, use_cache))

        found = (
            _given(run, inner, boundaries)
            if boundaries is not None
            else _needed(run, inner, attention)
        )
        known[key] = found
        if found.holds:
            known[(found.boundaries, *how)] = found  # batches will hold these
    return known[key]


def worst_of(verdicts: Sequence[Packing]) -> Packing:
    """The verdict that holds on all ranks."""
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed or len(set(verdicts)) == 1:
        return failed[0] if failed else verdicts[0]
    return Packing(
        False,
        f"the processes found it to differ: {verdicts[0]}, "
        f"{next(v for v in verdicts if v != verdicts[0])}",
    )


def uses_cache(model: torch.nn.Module) -> bool:
    """Whether the model fills a cache unless it is called with `use_cache=False`."""
    configs = (getattr(model, "config", None), _text_config(model))
    return any(getattr(config, "use_cache", False) is True for config in configs)


def without_cache(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a packed row, with `use_cache=False` if the model would fill a cache."""
    inner = inside_wrapper(model)
    if "use_cache" in inputs or not uses_cache(inner) or not accepts(inner, "use_cache"):
        return inputs
    return {**inputs, "use_cache": False}


# --- what to try ---


def _given(run: _Run, model: torch.nn.Module, boundaries: tuple[str, ...]) -> Packing:
    """The verdict on batches as they are; a failure names the boundaries that would help."""
    found = run(boundaries)
    if found.holds:
        return found
    use_cache = False if uses_cache(model) and accepts(model, "use_cache") else None
    if use_cache is False:
        found = run(boundaries, use_cache)
        if found.holds:
            return found
    taken = _boundaries_taken(model)
    if taken == boundaries:
        return found
    bounded = run(taken, use_cache)
    return replace(found, remedy=taken) if bounded.holds else _neither(found, bounded)


def _needed(run: _Run, model: torch.nn.Module, attention: str | None) -> Packing:
    """The fewest boundaries that suffice.

    Flash attention gets its own in any case: without them it waits for the device.
    """
    found = run(())
    taken = _boundaries_taken(model)
    if found.holds:
        for_flash = tuple(name for name in taken if name != "seq_idx")
        quicker = run(for_flash) if for_flash and "flash" in (attention or "") else found
        return quicker if quicker.holds else found
    if not taken:
        return found
    bounded = run(taken)
    return bounded if bounded.holds else _neither(found, bounded)


def _boundaries_taken(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(name for name in BOUNDARIES if accepts(model, name))


def _neither(found: Packing, bounded: Packing) -> Packing:
    if bounded.reason == found.reason:
        return found
    return replace(found, reason=f"{found.reason}; with the samples' boundaries: {bounded.reason}")


def _lengths(model: torch.nn.Module, most: int, longest: int | None) -> list[int]:
    """Unequal lengths of the samples of a row, each at least 2 tokens.

    The row exceeds the model's attention windows if real rows do.
    """
    most = max(most, 2 * _FEWEST)
    window = max((size for size in attention_windows(model) if size < most), default=0)
    positions = getattr(_text_config(model), "max_position_embeddings", None) or most
    longest = min(longest if longest is not None else most, positions, most // 2)
    sample = max(2, min(longest, max(_FEWEST, window + 8)))
    lengths = [sample, max(2, sample - 3)]
    while sum(lengths) < window + 8 and sum(lengths) + sample <= most:
        lengths.insert(0, sample)
    return lengths


def attention_windows(model: torch.nn.Module) -> Iterator[int]:
    """Sizes in the model's configuration that a row may exceed: attention windows, scan chunks."""
    for name, size in getattr(_text_config(model), "__dict__", {}).items():
        if (
            ("window" in name or "chunk" in name)
            and isinstance(size, int)
            and not isinstance(size, bool)
        ):
            yield size


def _text_config(model: torch.nn.Module) -> Any:
    """The configuration of the model's text part, or of the model."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config
