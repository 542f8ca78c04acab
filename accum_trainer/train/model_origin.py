"""Which update the weights in a model folder are of: a note that is written with them.

A run that is continued leaves the model of its earlier end in model/ until it is done again. The
note tells the two apart. Knows no model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import CheckpointError
from accum_trainer.train.checkpoint import digest_of, read_manifest
from accum_trainer.train.checkpoint_folder import list_checkpoints
from accum_trainer.train.run_folder import CHECKPOINTS, MODEL

NOTE = "accum_trainer.json"


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model's weights come from.

    Attributes:
        updates: they were made by this many updates.
        num_samples: samples of these updates, each as often as it was trained on.
        checkpoint: `identity_of` the checkpoint that holds the same weights.
    """

    updates: int
    num_samples: int
    checkpoint: str

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / NOTE).write_text(text + "\n", encoding="utf-8")


def read_origin(folder: Path) -> ModelOrigin | None:
    """The note in a model folder; None if there is none, or nothing that it could say."""
    try:
        read = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        origin = ModelOrigin(**read)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = [type(value) for value in dataclasses.astuple(origin)]
    return origin if kinds == [int, int, str] else None


def identity_of(checkpoint: Path) -> str:
    """Tells a checkpoint from all others, also from one of the same step.

    Raises:
        CheckpointError: its manifest cannot be read.
    """
    return digest_of(read_manifest(checkpoint))


def is_left_behind(run: Path) -> bool:
    """Whether the run has a checkpoint of other weights than model/, or has no model/ and could
    export one."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    if not checkpoints:
        return False
    origin = read_origin(run / MODEL)
    try:
        return origin is None or origin.checkpoint != identity_of(checkpoints[-1])
    except CheckpointError:
        return True
