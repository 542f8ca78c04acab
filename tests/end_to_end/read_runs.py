"""Read the results and the weights of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of the folder of a model or of an adapter."""
    found = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    assert found, f"{folder} has no weights"
    return found
