"""The state of a training, into a checkpoint and out of one.

A continued run must have the same objective and windows (`Training.identity`). The optimizer keeps
its learning rate and weight decay; clipping, schedule and precision are the new command's. The
run's configuration states the values in force, and a note names each that differs. Every process
calls each function.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.lm.model import checksum
from accum_trainer.train import checkpoint as checkpoints
from accum_trainer.train.checkpoint import Checkpoint, Snapshot
from accum_trainer.train.rank_agreement import check_same_start
from accum_trainer.train.records import Tally
from accum_trainer.train.setup import Training

# Options that the optimizer's saved state overrides.
_KEPT = ("lr", "lr_scaling", "lr_base_batch_size", "weight_decay")
# In the identity of a run that branched: what `branch_from` was, the checkpoint that it named then,
# and the checkpoint's own identity.
BRANCHED_FROM = "branched_from"
# Of the rows that losses are measured on: the beginning of their identity.
EVALUATION_ROWS = "the evaluation rows' content"
# Options that a continued run may change.
_NEW = (
    "max_grad_norm",
    "scheduler",
    "warmup",
    "total_updates",
    "accumulation_dtype",
    "mixed_precision",
    EVALUATION_ROWS,
)


def capture(
    training: Training, tally: Tally, best: dict[str, Any] | None, alone: bool = False
) -> Snapshot:
    """This process's part of the state after a finished window, copied into host memory.

    Args:
        tally: of the run's records so far.
        best: the best checkpoint by then, as `BestCheckpoint.begin_save` gives it.
        alone: all processes' part, where this one has it.
    """
    engine = training.accumulator.engine
    optimizer = training.optimizer.accelerated
    parts_here = engine.all_parts if alone and engine.world_size > 1 else engine.own_parts
    parts = [part.on_host() for part in parts_here(training.model, optimizer)]
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    state = {
        "optimizer_groups": [_as_json(group) for group in engine.optimizer_groups(optimizer)],
        "identity": training.identity,
        "options": _changeable_options(training),
        "accumulator": training.accumulator.state_dict(),
        "windows": training.windows.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "tally": dataclasses.asdict(tally),
        "best": best,
        "world_size": 1 if alone else engine.world_size,
    }
    # Written while training goes on and changes what the state was read from.
    return Snapshot(parts, engine.rng_state(), copy.deepcopy(state))


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options without tensors, such as a learning rate on the device."""
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def restore(training: Training, path: Path) -> tuple[Training, Tally]:
    """`training` in the state of the checkpoint at `path`, and the tally of the run's records.
    Collective.

    Raises:
        CheckpointError: it is damaged, or another run's.
        ConfigError: the run has gone past the steps or epochs of this command.
        EngineError: the processes would start from different states.
    """
    acc, engine = training.accumulator, training.accumulator.engine
    share = engine.share_of_file(path / checkpoints.MANIFEST)
    saved: Checkpoint = engine.together(checkpoints.load_checkpoint, path, share)
    notes = engine.on_main(check_same_run, saved.state["identity"], training.identity, path)
    _check_not_past_its_end(training, saved.state, path)
    shapes = engine.shapes_of_weights(training.model)
    engine.together(checkpoints.check_same_weights, saved.model.shapes(), shapes)
    training = _with_kept_options(
        training, saved.state["options"], saved.optimizer["groups"][0], notes or []
    )
    engine.load_full_weights(training.model, saved.model)
    engine.load_full_optimizer_state(
        training.model, training.optimizer.accelerated, saved.optimizer
    )
    acc.load_state_dict(saved.state["accumulator"])
    training.scheduler.load_state_dict(saved.state["scheduler"])
    training.windows.load_state_dict(saved.state["windows"])
    tally = Tally(**saved.state["tally"])
    check_start(training, records=tally.records)
    if len(saved.rng) == engine.world_size:
        engine.set_rng_state(saved.rng[engine.rank])
    else:
        training.notes.append(
            f"continued on {engine.world_size} processes from {saved.state['world_size']}: the "
            "same windows; dropout, if any, draws anew"
        )
    training.notes.append(f"continued from {path} after {acc.num_updates} updates")
    return _of_same_branch(training, saved.state["identity"], path), tally


def _of_same_branch(training: Training, saved: dict[str, Any], path: Path) -> Training:
    """`training` with the origin of a run that branched, which its checkpoint at `path` notes.

    Raises:
        CheckpointError: the command names another origin.
    """
    asked, origin = training.config.branch_from, saved.get(BRANCHED_FROM)
    began = origin["asked"] if origin is not None else None
    if asked is not None and asked != began:
        raise CheckpointError(
            f"branch_from={asked}, but the run of {path} "
            f"{f'branched from {began}' if began else 'did not branch from another'}; leave "
            "branch_from out to continue it, or begin the branch in another output_dir"
        )
    if origin is None:
        return training
    return dataclasses.replace(
        training,
        config=dataclasses.replace(training.config, branch_from=began),
        identity=training.identity | {BRANCHED_FROM: origin},
    )


def check_start(training: Training, **counters: int) -> None:
    """Raise an EngineError unless all processes start from the same state. Collective."""
    check_same_start(training.accumulator.engine, _checksums(training) | counters)


def _check_not_past_its_end(training: Training, saved: dict[str, Any], path: Path) -> None:
    """Raise a ConfigError if the saved run is longer than this command's; one that is exactly as
    long is complete.

    Args:
        saved: the state that `capture` gave.
    """
    config, position = training.config, saved["windows"]
    assert training.schedule.plan.num_samples is not None
    share_of_epoch = position["samples_consumed"] / training.schedule.plan.num_samples
    done = {
        "steps": saved["accumulator"]["num_updates"],
        "epochs": position["epoch"] + share_of_epoch,
    }
    name = "steps" if config.steps is not None else "epochs"
    asked = getattr(config, name)
    if done[name] > asked:
        counted = {"steps": "updates"}.get(name, name)
        raise ConfigError(
            f"{name}={asked}, but the run has gone past it: {path} was written after "
            f"{done[name]:.6g} {counted}; give {name}={math.ceil(done[name])} or more to continue "
            "it, or another output_dir to start anew"
        )


def _changeable_options(training: Training) -> dict[str, Any]:
    """Options that do not decide the run's identity, as a checkpoint notes them."""
    names = [name for name in (*_KEPT, *_NEW) if hasattr(training.config, name)]
    evaluation = training.data.evaluation
    return {name: getattr(training.config, name) for name in names} | {
        EVALUATION_ROWS: evaluation.identity[:12] if evaluation is not None else None,
        "total_updates": training.schedule.total_updates,
        "mixed_precision": training.accumulator.engine.mixed_precision,
    }


def _with_kept_options(
    training: Training, saved: dict[str, Any], saved_group: dict[str, Any], notes: list[str]
) -> Training:
    """`training` with the options in force, and a note for each that differs from the command or
    from before.

    Args:
        saved: `_changeable_options` of the run that is continued.
        saved_group: options of its optimizer's first group.
        notes: further notes, which come last.
    """
    changes = []
    asked = training.optimizer.param_groups[0]
    for key, name in {"initial_lr": "lr", "weight_decay": "weight_decay"}.items():
        if asked[key] != saved_group[key]:
            changes.append(
                f"{name}={asked[key]:g} is ignored: the run keeps the {saved_group[key]:g} that it "
                "was started with; give another output_dir to start anew"
            )
    now = _changeable_options(training)
    changes += [
        f"{name} is {now[name]} from here on; until now it was {saved[name]}"
        for name in _NEW
        if now[name] != saved.get(name)
        and not (name == EVALUATION_ROWS and saved.get(name) is None)
    ]
    return dataclasses.replace(
        training,
        config=dataclasses.replace(training.config, **{name: saved[name] for name in _KEPT}),
        schedule=dataclasses.replace(training.schedule, peak_lr=saved_group["initial_lr"]),
        notes=[*training.notes, *changes, *notes],
    )


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> list[str]:
    """Compare two runs' identities; return notes on differences that do not matter.

    A model or a data file may have moved: its content is compared. Weights that no process has
    whole (None) are not compared.

    Raises:
        CheckpointError: something differs, with both values; or a version of the package wrote the
            checkpoint that did not note it.
    """
    notes = []
    for key, value in current.items():
        if key not in saved:
            raise CheckpointError(
                f"{path} was written by a version of accum_trainer that did not note {key}, so it "
                "cannot be compared with this run; start anew in another output_dir"
            )
        before = saved[key]
        if before == value or (key == "initial_weights" and None in (before, value)):
            continue
        if key == "model_config":
            # Only options that both versions of transformers know.
            differing = [name for name in before if name in value and before[name] != value[name]]
            if not differing:
                continue
            key, before, value = (
                f"{differing[0]} of the model",
                before[differing[0]],
                value[differing[0]],
            )
        same = {"model": "initial_weights", "data": "data_content"}.get(key)
        if same is not None and current[same] is not None and saved.get(same) == current[same]:
            notes.append(f"{key}={before} is {value} now; its content is the same")
            continue
        named = {
            "initial_weights": "the checksum of the weights of the model before training",
            "data_content": "the checksum of the data",
        }.get(key, key)
        raise CheckpointError(
            f"{path} was trained with {named}={before}, this run has {named}={value}: it would not "
            f"be the same run. Give {named}={before} again, or start anew in another output_dir"
        )
    return notes


def _checksums(training: Training) -> dict[str, Any]:
    """The state that must be the same on every process before the first update."""
    engine = training.accumulator.engine
    model = training.model
    states = (
        (f"{name} {key}", value)
        for name, state in engine.each_parameter_state(model, training.optimizer.accelerated)
        for key, value in state.items()
    )
    return {
        "updates": training.accumulator.num_updates,
        **training.windows.state_dict(),
        "lr": training.scheduler.get_last_lr()[0],
        "weights": checksum(engine.each_full_weight(model, trained_only=True)),
        "optimizer state": checksum(states),
    }
