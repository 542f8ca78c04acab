"""A checkpoint as `from_pretrained` loads it: the model that a stopped run had by then.

Knows a run directory and its checkpoints; trains nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from accum_trainer.config import TrainConfig
from accum_trainer.engine.full_state import persistent_buffers
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.runs.json_file import read_json
from accum_trainer.train.checkpoint import Checkpoint, check_same_weights, load_checkpoint
from accum_trainer.train.checkpoint_folder import find_checkpoint, list_checkpoints
from accum_trainer.train.model_origin import ModelOrigin, identity_of
from accum_trainer.train.run_folder import CHECKPOINTS, CONFIG, PLAN, check_writable
from accum_trainer.train.saved_model import write_model

# Of a run that trains: it deletes what is being read, and has something newer by then.
_MOST_TRIES = 10


def export(source: Path, target: Path, trust_remote_code: bool = False) -> Path:
    """Write the model of a checkpoint to the folder `target`, which is new or empty; return the
    checkpoint.

    Args:
        source: a run directory, whose newest whole checkpoint is taken, or a checkpoint in one.
        trust_remote_code: let the model run Python code that comes with it.

    Raises:
        CheckpointError: there is no whole checkpoint, or it lies outside its run.
        ConfigError: `target` has something in it; the model cannot be loaded.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"output={target} exists already; name a new or empty folder")
    check_writable("output", target)
    checkpoint, identity, loaded, saved = _newest_of(source)
    run = checkpoint.absolute().parent.parent
    if not (run / CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} lies in no run directory ({run / CONFIG} is missing), so the model that "
            "it belongs to is not known; put it back into its run"
        )
    config = TrainConfig.from_yaml(run / CONFIG, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items() if name in saved}
    try:
        check_same_weights(loaded.model.shapes(), shapes)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint} is not of model={config.model}, which {run / CONFIG} names: {error}; "
            "put the run's own files, and the model that it was trained from, back in place"
        ) from None
    model.load_state_dict(saved, strict=False)
    # Without the second names of tied weights, which a cast would untie.
    weights = {n: p.detach() for n, p in model.named_parameters()} | persistent_buffers(model)
    if target.exists():
        target.rmdir()  # it is empty
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = ModelOrigin(
        loaded.state["accumulator"]["num_updates"], loaded.state["tally"]["num_samples"], identity
    )
    trained = saved if config.use_peft else weights
    write_model(target, config, _plan_of(run), model, tokenizer, trained, origin)
    return checkpoint


def _plan_of(run: Path) -> dict[str, Any]:
    """plan.json, which the model card quotes; empty if it cannot be read."""
    try:
        return read_json(run / PLAN)
    except CheckpointError:
        return {}


def _newest_of(
    source: Path, tries: int = _MOST_TRIES
) -> tuple[Path, str, Checkpoint, dict[str, torch.Tensor]]:
    """The checkpoint that `source` names, its identity, its content and its weights; looked for
    again if the run has others by the time that it cannot be read."""
    before = list_checkpoints(source / CHECKPOINTS)
    try:
        # A path, also if the folder has the name of a mode, such as `auto`.
        checkpoint = find_checkpoint(os.path.join(os.curdir, source), None, option="source")
        assert checkpoint is not None
        loaded = load_checkpoint(checkpoint)
        return checkpoint, identity_of(checkpoint), loaded, dict(loaded.model)
    except CheckpointError:
        if tries == 1 or list_checkpoints(source / CHECKPOINTS) == before:
            raise
    return _newest_of(source, tries - 1)
