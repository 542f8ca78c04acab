"""A continued run: what must be as it was, what the run goes on with, and what the new command
decides from here on.

The objective and the windows must be the same (`Training.identity`, compared by
`checkpoint.check_same_run`). The optimizer goes on with its own learning rate and weight decay.
Clipping, schedule and precision are the new command's. The record of the run states what is in
force, and a note says each value that differs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from accum_trainer.train.setup import Training

# The optimizer's own, which a checkpoint brings along.
KEPT = ("lr", "lr_scaling", "lr_base_batch_size", "weight_decay")
# What each window asks anew.
_NEW = (
    "max_grad_norm",
    "scheduler",
    "warmup",
    "total_updates",
    "accumulation_dtype",
    "mixed_precision",
)


def options_of(parts: Training) -> dict[str, Any]:
    """What a checkpoint notes of the options that do not decide what the run is."""
    names = [name for name in (*KEPT, *_NEW) if hasattr(parts.config, name)]
    engine = parts.accumulator.engine
    found = {name: getattr(parts.config, name) for name in names}
    return found | {"total_updates": parts.total_updates, "mixed_precision": engine.mixed_precision}


def in_force(parts: Training, saved: dict[str, Any], saved_group: dict[str, Any]) -> Training:
    """`parts` with the options that the run goes on with, and a note for each that is not what was
    asked or was before.

    Args:
        saved: `options_of` the run that is continued.
        saved_group: options of its optimizer's first group.
    """
    notes = []
    asked = parts.optimizer.param_groups[0]
    for key, name in {"initial_lr": "lr", "weight_decay": "weight_decay"}.items():
        if asked[key] != saved_group[key]:
            notes.append(
                f"{name}={asked[key]:g} is not taken: the run goes on with the "
                f"{saved_group[key]:g} that it was started with; give "
                "another output_dir to start anew"
            )
    now = options_of(parts)
    notes += [
        f"{name} is {now[name]} from here on; until now it was {saved[name]}"
        for name in _NEW
        if now[name] != saved[name]
    ]
    return dataclasses.replace(
        parts,
        config=dataclasses.replace(parts.config, **{name: saved[name] for name in KEPT}),
        peak_lr=saved_group["initial_lr"],
        notes=[*parts.notes, *notes],
    )
