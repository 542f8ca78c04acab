"""The trained model as `from_pretrained` loads it: model/, and model-merged/ with a merged adapter.

Runs on the main process; `weights` are gathered before. Knows no engine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from accum_trainer.config import TrainConfig
from accum_trainer.lm.model import load_model, stored_dtype
from accum_trainer.train import durable
from accum_trainer.train.model_card import CARD, model_card
from accum_trainer.train.model_origin import ModelOrigin
from accum_trainer.train.run_folder import MERGED, MODEL

# A file is in memory while it is written.
_LARGEST_FILE = "5GB"


def needs_only_trained_weights(config: TrainConfig) -> bool:
    """Whether the saved model holds trained weights only: an adapter whose base model stays where
    it is."""
    return config.use_peft and not config.merge_adapter


def save_model(
    folder: Path,
    config: TrainConfig,
    plan: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    weights: dict[str, torch.Tensor],
    origin: ModelOrigin,
) -> None:
    """Write model/ into `folder`, and model-merged/ if the configuration asks for it.

    Args:
        plan: plan.json, for the model card.
        model: the unwrapped model, or its adapter's model.
        weights: whole weights by name; only trained ones if `needs_only_trained_weights`.
        origin: of the weights.

    Raises:
        OSError: writing failed; what was there before is as it was.
    """
    write_model(folder / MODEL, config, plan, model, tokenizer, weights, origin)
    if config.merge_adapter:
        # A fresh model is whole even if the trained one is sharded.
        fresh = load_model(config, tokenizer)
        fresh.load_state_dict(weights, strict=False)
        merged, dtype = fresh.merge_and_unload(), _model_dtype(config)
        card = model_card(config, plan, origin, is_adapter=False)
        _write(folder / MERGED, merged, tokenizer, merged.state_dict(), dtype, origin, card)


def write_model(
    target: Path,
    config: TrainConfig,
    plan: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    weights: dict[str, torch.Tensor],
    origin: ModelOrigin,
) -> None:
    """Write the folder that `from_pretrained` loads: a model, or with `use_peft` an adapter."""
    card = model_card(config, plan, origin, is_adapter=config.use_peft)
    _write(target, model, tokenizer, weights, saved_dtype(config), origin, card)


def _write(
    target: Path,
    model: Any,
    tokenizer: Any,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    origin: ModelOrigin,
    card: str,
) -> None:
    """Write beside `target`, then rename into place. An adapter (`dtype` None) stays in float32.

    Raises:
        OSError: writing failed; `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    durable.remove(partial)
    try:
        with _without_bar():
            state = _cast(weights, dtype or torch.float32)
            model.save_pretrained(partial, state_dict=state, max_shard_size=_LARGEST_FILE)
        if dtype is not None:
            _state_dtype(partial / "config.json", dtype)
        tokenizer.save_pretrained(partial)
        origin.write(partial)
        (partial / CARD).write_text(card, encoding="utf-8")  # in place of PEFT's empty template
        durable.put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        durable.remove(partial)
        raise OSError(f"{target} could not be written: {error}") from error


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Leave out transformers' bar over the files that it writes; bars of others stay."""
    from transformers.utils import logging

    def make(factory: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Writing model shards":
            kwargs = {**kwargs, "disable": True}
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def saved_dtype(config: TrainConfig) -> torch.dtype | None:
    """Of the weights in model/; None for an adapter, whose weights are saved as they are."""
    return None if config.use_peft else _model_dtype(config)


def _model_dtype(config: TrainConfig) -> torch.dtype:
    if config.save_dtype != "auto":
        return getattr(torch, config.save_dtype)
    return torch.float32 if config.shard is not None else stored_dtype(config)


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating weights in `dtype`; one that has it is not copied."""
    return {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}


def _state_dtype(config: Path, dtype: torch.dtype) -> None:
    """Name `dtype` in a saved model's config.json, so that `from_pretrained` loads that dtype."""
    stated = json.loads(config.read_text())
    stated.pop("torch_dtype", None)
    config.write_text(json.dumps(stated | {"dtype": str(dtype).removeprefix("torch.")}, indent=2))
