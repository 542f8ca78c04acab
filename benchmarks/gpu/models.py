"""Llamas built from a configuration, with random weights, and ragged rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SIZES = {
    "1M": (128, 352, 4, 4, 4, 512),
    "9M": (384, 1024, 4, 6, 2, 2048),
    "60M": (768, 2048, 8, 12, 12, 2048),
    "0.3B": (1024, 2816, 24, 16, 16, 4096),
    "0.5B": (1280, 3456, 22, 20, 20, 32000),
    "1.5B": (2048, 5632, 28, 16, 8, 32000),
}


def llama(size: str, positions: int = 2048, **options: Any) -> torch.nn.Module:
    """In float32, seed 0, without a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, shared, vocabulary = SIZES[size]
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": positions,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | options)))


class Ragged(Sequence[dict[str, list[int]]]):
    """Rows of random tokens, all of them targets; lengths log-normal, as instruction data's are.

    Attributes:
        lengths: shape (count,), int64.
    """

    def __init__(self, count: int, median: int, longest: int, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        drawn = rng.lognormal(np.log(median), 0.8, count)
        self.lengths = np.clip(drawn, 8, longest).astype(np.int64)
        self._ids = [rng.integers(1, vocabulary, length).tolist() for length in self.lengths]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}
