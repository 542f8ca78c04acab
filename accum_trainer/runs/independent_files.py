"""What stands in a folder of independent runs beside their run directories. Knows no configuration
and no model; imports no torch.

    runs/NAME/independent.json     {"runs": [{"name": "part-0", "settings": {"shard": "0/4"}}, ...]}
    runs/NAME/summary.json         how they ended
    runs/NAME/merged/merge.json    the parts of a merge and its evaluation
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accum_trainer.errors import CheckpointError
from accum_trainer.runs.inside import check_is_name
from accum_trainer.runs.json_file import read_json

INDEPENDENT, SUMMARY = "independent.json", "summary.json"
MERGED, REPORT = "merged", "merge.json"


def listed_runs(folder: Path, remedy: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each run in a folder's independent.json.

    Args:
        remedy: the end of the message.

    Raises:
        CheckpointError: it cannot be read, or names no runs, or names something else.
    """
    index = folder / INDEPENDENT
    try:
        runs = [
            (check_is_name(run["name"], index), dict(run.get("settings", {})))
            for run in read_json(index)["runs"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        runs = []
    if not runs:
        raise CheckpointError(f"{index} names no runs; {remedy}")
    return runs


def label_of(settings: Mapping[str, Any]) -> str:
    """What sets a run apart, in a few words: `shard 0/4`, `lr=1e-4`."""
    return " ".join(
        f"{key} {value}" if key == "shard" else f"{key}={value}" for key, value in settings.items()
    )
