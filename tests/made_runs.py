"""Run directories as training leaves them, made by hand: any weights, any number of samples, any
end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from accum_trainer.config import TrainConfig

# Rows that are nowhere and none to evaluate on: no model is loaded unless a test wants it.
NO_EVALUATION = TrainConfig(dataset_file="nowhere.jsonl")


def make_run(
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    num_samples: int = 4,
    config: TrainConfig = NO_EVALUATION,
    *,
    initial_weights: str = "0badcafe",
    shard: str | None = None,
    **result: object,
) -> Path:
    """Write a finished run; `weights` become its model/, which a test may also write itself."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    plan = {"initial_weights": initial_weights, "shard": shard, "total_updates": 10}
    (folder / "plan.json").write_text(json.dumps(plan))
    ended = {"done": True, "stopped_by": "", "updates": 10, "num_samples": num_samples} | result
    (folder / "result.json").write_text(json.dumps(ended))
    if weights is not None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        save_file(dict(weights), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


def list_runs(folder: Path, *names: str) -> Path:
    """Write the independent.json of a parallel-independent run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "independent.json").write_text(
        json.dumps({"runs": [{"name": name, "settings": {}} for name in names]})
    )
    return folder
