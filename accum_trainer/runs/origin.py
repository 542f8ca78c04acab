"""The model that runs started from, made again from their configuration.

Adapters need it: to be evaluated, and to be merged into a whole model. Knows the configuration of a
run; nothing of averages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accum_trainer.config import TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.lm.model import fingerprint, load_model, load_tokenizer, stored_dtype


class Origin:
    """The model that the runs started from.

    Args:
        config: of the first run; the others started from the same weights.
        model: folder of its result, with the tokenizer and its chat template.
        initial_weights: fingerprint of the weights at the start, adapters included.
    """

    def __init__(self, config: TrainConfig, model: Path, initial_weights: str) -> None:
        self.config = replace(
            config,
            gradient_checkpointing=False,
            activation_offload=False,
            merge_adapter=False,
            attention=None,
            chat_template=None,
        )
        self._model, self._initial_weights = model, initial_weights
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the first run."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.of_folder(self._model))
        return self._tokenizer

    def check(self) -> None:
        """Raise a ConfigError unless this machine gives the runs' initial weights again."""
        with _seeded(self.config.seed):
            found = fingerprint(load_model(self.config, self.tokenizer))
        if found != self._initial_weights:
            raise ConfigError(
                f"the runs started from weights {self._initial_weights}, but "
                f"model={self.config.model} gives {found} here: it has changed, or this version of "
                "torch draws other random numbers; restore the model that was trained"
            )

    def load(self) -> Any:
        """The model without adapters, in float32."""
        with _seeded(self.config.seed):
            return load_model(self.config.without_peft(), self.tokenizer)

    def dtype(self) -> torch.dtype:
        """The dtype of the stored model."""
        return stored_dtype(self.config)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw the random numbers of a training with this seed; the caller's generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
