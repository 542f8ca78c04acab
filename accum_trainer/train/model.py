"""The model of a training with its optimizer and scheduler: loaded, proven, prepared by the engine.

Every process calls each function; a check that fails on one process fails on all.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from accum_trainer.accumulator import Accumulator
from accum_trainer.config import TrainConfig
from accum_trainer.engine.scattering import signature_of
from accum_trainer.errors import ConfigError, EngineError
from accum_trainer.lm.model import (
    compile_blocks,
    fingerprint,
    frozen_dtype,
    is_flash,
    load_model,
    shape_of_model,
)
from accum_trainer.lm.offloading import offload_block_inputs
from accum_trainer.losses.head import LossPath, decide_loss_path
from accum_trainer.losses.targets import SHIFTED
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.speed.cutting import Cutting, decide_cut, decide_layout
from accum_trainer.train.rows import Data
from accum_trainer.train.schedule import Schedule

# Where a model came from and how it is run: no part of the function it computes.
_NOT_THE_FUNCTION = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "name_or_path",
}


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to train, and the choices made for it.

    Attributes:
        model: as the engine wrapped it.
        optimizer, scheduler: as `Accumulator.prepare` returned them.
        initial_weights: fingerprint of the weights before training, or None if no process has them
            whole; runs that share it can be merged.
        function: the model's configuration as far as it decides the function computed: dropout,
            positions, activations.
        loss_path: where logits are computed.
        objective: the objective in words.
        compiled_blocks: how many of the model's blocks torch compiles.
        cutting: how windows become micro-batches, and why.
        collate: makes a micro-batch from samples.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    initial_weights: str | None
    function: dict[str, Any]
    loss_path: LossPath
    objective: str
    compiled_blocks: int
    cutting: Cutting
    collate: PaddingCollator | PackingCollator


def prepare_model(
    config: TrainConfig, accumulator: Accumulator, data: Data, schedule: Schedule
) -> PreparedModel:
    """Load the model, make its optimizer, and decide and prove how it is run. Collective.

    Raises:
        ConfigError, EngineError: the model cannot be loaded, differs between processes, or cannot
            be trained this way.
    """
    engine, rows = accumulator.engine, data.train
    unprepared = load_same(config, engine, data.tokenizer)
    initial_weights = _same_weights(engine, config, unprepared)
    _check_attention(unprepared, engine)
    if config.activation_offload:
        offload_block_inputs(unprepared)
    if not any(p.requires_grad for p in unprepared.parameters()):
        raise ConfigError(
            f"model={config.model} has no weight that is trained, as an adapter that was saved has "
            "none; add use_peft to train new adapters on top of it, or name the base model"
        )
    # Fused: one pass over weights and states instead of ten.
    adamw = torch.optim.AdamW(
        _decay_groups(unprepared, config.weight_decay), lr=schedule.peak_lr, fused=True
    )
    decay = torch.optim.lr_scheduler.LambdaLR(adamw, schedule.lr_factor)
    model, optimizer, scheduler = accumulator.prepare(unprepared, adamw, decay)
    some_tokens = torch.tensor([rows[0]["input_ids"]], device=engine.device)
    loss_path = decide_loss_path(model, some_tokens, config.loss_on_targets)
    layout = decide_layout(config, accumulator, model, rows)
    objective = _prove_objective(accumulator, data)  # its sizes must not be compiled for
    compiled = _compile(config, engine, model) if config.compile else 0
    cutting = decide_cut(config, accumulator, model, optimizer, rows, layout)
    return PreparedModel(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        initial_weights=initial_weights,
        function=_function(unprepared),
        loss_path=loss_path,
        objective=objective,
        compiled_blocks=compiled,
        cutting=cutting,
        collate=PackingCollator(layout.boundaries)
        if cutting.cut.packed
        else PaddingCollator(data.pad_token_id, cutting.cut.multiple),
    )


def load_same(config: TrainConfig, engine: Any, tokenizer: Any) -> Any:
    """The model with the same initial weights on every process, under every split.

    Where the engine can deal them out, rank 0 alone reads them, and the others build their shapes:
    a machine holds the model once, not once per process.
    """
    torch.manual_seed(config.seed)
    frozen = frozen_dtype(config, engine.mixed_precision)
    if engine.deals_weights and engine.world_size > 1:
        model = engine.together(_load_on_main, config, engine.is_main, tokenizer, frozen)
        # All read one whose weights are not what its configuration says, such as a quantised one,
        # or an adapter's folder, which has no configuration.
        signature = None if model is None else signature_of(model)
        if len(set(map(str, engine.gather_objects(signature)))) == 1:
            return model
        del model
        torch.manual_seed(config.seed)
    # With weights sharded at loading, loading is itself a collective.
    is_alone = engine.runs_alone or engine.deals_weights
    load = partial(engine.together, load_model) if is_alone else load_model
    return load(config, tokenizer, frozen)


def _load_on_main(config: TrainConfig, is_main: bool, tokenizer: Any, frozen: torch.dtype) -> Any:
    """The model, elsewhere its shape; None if that cannot be had without reading the weights."""
    if is_main:
        return load_model(config, tokenizer, frozen)
    try:
        with torch.device("meta"):
            return shape_of_model(config, frozen)
    except Exception:  # of any type: the model's own code. What is wrong, loading it says
        return None


def _same_weights(engine: Any, config: TrainConfig, model: Any) -> str | None:
    """The fingerprint of the weights; refuses processes that start from different ones.

    DDP would broadcast rank 0's trained weights but not frozen ones; an engine that shards would
    mix them.
    """
    everyones = engine.gather_objects((fingerprint(model), socket.gethostname()))
    first, first_host = everyones[0]
    for rank, (weights, host) in enumerate(everyones):
        if weights not in (first, None):
            raise EngineError(
                f"process {rank} ({host}) starts from other weights than process 0 "
                f"({first_host}): checksums {weights} and {first}; does "
                f"model={config.model} name the same files on both?"
            )
    return first


def _check_attention(model: Any, engine: Any) -> None:
    attention = getattr(model.config, "_attn_implementation", None) or ""
    device, precision = engine.device.type, engine.mixed_precision
    if attention == "flex_attention" and device == "cpu":
        raise ConfigError(f"attention={attention} gives no gradient on a CPU; use attention=sdpa")
    if is_flash(attention) and (device == "cpu" or precision == "no"):
        raise ConfigError(
            f"attention={attention} needs a GPU and 16-bit numbers, and this is a {device} with "
            f"mixed_precision={precision}; use attention=sdpa"
            + ("" if device == "cpu" else ", or amp")
        )


def _function(model: Any) -> dict[str, Any]:
    options = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {
        key: value
        for key, value in options.items()
        if not key.startswith("_") and key not in _NOT_THE_FUNCTION
    }


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _prove_objective(accumulator: Accumulator, data: Data) -> str:
    """Find this model's objective and prove it on a few samples that all processes share.

    Raises:
        EngineError: BatchNorm, whose statistics depend on how a window is cut.
        ConfigError: the model's own loss does not predict the next token.
    """
    with_targets = np.flatnonzero(data.train.num_targets)[:4]
    samples = [data.train[int(index)] for index in with_targets]
    objective = accumulator.losses.decide([PaddingCollator(data.pad_token_id)(samples)])
    assert objective is not None
    if objective.reduction and objective.counting != SHIFTED:
        raise ConfigError(
            "train predicts the next token, but this model's own loss is a "
            f"{objective.describe()}; give a causal language model, or write the loop with "
            "Accumulator"
        )
    return objective.describe()


def _compile(config: TrainConfig, engine: Any, model: Any) -> int:
    """Compile the model's blocks; return how many.

    Raises:
        ConfigError: the engine's hooks cannot be compiled.
    """
    if not engine.can_compile:
        raise ConfigError(
            f"compile=true cannot see through {engine.name}, which fetches each weight when it is "
            "used; leave it out, or use zero2 or fsdp2"
        )
    return compile_blocks(engine.unwrap(model), engine.device)
