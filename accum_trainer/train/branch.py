"""A run that branches from another run's checkpoint: a new run, with other windows.

It takes the weights, the optimizer's state and the place in the data, counted in samples, so that
branches with different effective batches see the same samples in the same order. Updates count from
0, and learning rate and schedule are its own. What else decides the windows and the objective must
agree, as in a run that is continued. Where it came from is part of its identity (`branched_from`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accum_trainer.errors import CheckpointError
from accum_trainer.train import checkpoint as checkpoints
from accum_trainer.train.checkpoint import Checkpoint
from accum_trainer.train.model_origin import identity_of
from accum_trainer.train.resume import BRANCHED_FROM, check_same_run, check_start
from accum_trainer.train.setup import Training

# Options of the optimizer's groups that a branch decides for itself.
_OWN = ("lr", "initial_lr", "weight_decay")


def branch(training: Training, path: Path) -> Training:
    """`training`, which has not begun, from the checkpoint at `path`. Collective.

    Raises:
        CheckpointError: it is damaged, or of another model, data or seed.
        EngineError: the processes would start from different states.
    """
    acc, engine = training.accumulator, training.accumulator.engine
    share = engine.share_of_file(path / checkpoints.MANIFEST)
    saved: Checkpoint = engine.together(checkpoints.load_checkpoint, path, share)
    before = saved.state["identity"]
    expected = before | {"global_batch_size": training.identity["global_batch_size"]}
    notes = engine.on_main(check_same_run, expected, training.identity, path)
    shapes = engine.shapes_of_weights(training.model)
    engine.together(checkpoints.check_same_weights, saved.model.shapes(), shapes)
    engine.load_full_weights(training.model, saved.model)
    optimizer = training.optimizer.accelerated
    own = engine.optimizer_groups(optimizer)
    groups = [
        theirs | {name: ours[name] for name in _OWN if name in ours}
        for theirs, ours in zip(_as_many(saved.optimizer["groups"], own, path), own, strict=True)
    ]
    engine.load_full_optimizer_state(
        training.model, optimizer, {"state": saved.optimizer["state"], "groups": groups}
    )
    position = {k: v for k, v in saved.state["windows"].items() if k != "noise"}
    training.windows.load_state_dict(position)
    check_start(training)
    asked = training.config.branch_from
    origin = {"asked": asked, "path": str(path), "checkpoint": identity_of(path)}
    done = saved.state["accumulator"]["num_updates"]
    note = (
        f"branched from {path} after {done} updates of {before['global_batch_size']} samples: "
        f"this run's updates count from 0, of {acc.plan.global_batch_size} samples"
    )
    return dataclasses.replace(
        training,
        identity=training.identity | {BRANCHED_FROM: origin},
        notes=[*training.notes, note, *(notes or [])],
    )


def _as_many(
    saved: list[dict[str, Any]], own: list[dict[str, Any]], path: Path
) -> list[dict[str, Any]]:
    if len(saved) != len(own):
        raise CheckpointError(
            f"{path} has {len(saved)} groups of parameters in its optimizer, this run {len(own)}; "
            "give the options of the model that it was trained with"
        )
    return saved
