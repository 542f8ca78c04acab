"""Loss variance: by how much it falls from K = 1 to K = 16 at B = 2 (requirement R24).

    python -m benchmarks.variance [--data FILE] [--seeds 0 1 2] [--updates 100] [--picture FILE]

Trains the tiny model on the CPU with `accum-trainer train` and compares the runs with
`accum-trainer compare`, once after as many updates and once after as many samples: K = 1 makes 16
times the updates then. Without --data on the embedded text. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.launching import python

B, K = 2, 16
COMMON = (
    *("--cpu", "--batch-size", B, "--lr", "1e-3", "--warmup", "10%", "--max-seq-len", 128),
    *("--checkpoint-every", 100_000),
)


def accum_trainer(*arguments: Any) -> None:
    """Run the command.

    Raises:
        RuntimeError: it failed.
    """
    ended = python("-m", "accum_trainer", *arguments, timeout=3600)
    if ended.returncode != 0:
        raise RuntimeError(f"{arguments} failed: {ended.stderr[-3000:]}")


def train(folder: Path, k: int, updates: int, seed: int, data: Path | None) -> Path:
    """One run; its directory."""
    run = folder / f"seed-{seed}" / f"k{k}-{updates}-updates"
    more = ("--dataset-file", data) if data is not None else ()
    accum_trainer(
        *("train", *COMMON, *more, "--gradient-accumulation-steps", k, "--steps", updates),
        *("--seed", seed, "--output-dir", run),
    )
    return run


def compare(small: Path, large: Path, axis: str, picture: Path | None) -> dict[str, Any]:
    """What `compare` says about two runs."""
    found = small.with_name(f"{small.name}-{axis}.json")
    drawn = ("-o", picture) if picture is not None else ("--no-picture",)
    accum_trainer("compare", small, large, "--axis", axis, "--json", found, *drawn)
    comparison: dict[str, Any] = json.loads(found.read_text())
    return comparison


def row(seed: int, axis: str, found: dict[str, Any]) -> str:
    """A line of Markdown."""
    small, large = found["runs"]
    low, high = large["variance_fall_95"]
    at = [run["loss_at"][axis] for run in (small, large)]
    spikes = [len(run["spikes"]) for run in (small, large)]
    return (
        f"| {seed} | {found['variance_range']['until']:,.0f} {axis} | {small['variance']:.4f} | "
        f"{large['variance']:.4f} | {-large['variance_fall']:+.1%} ({-high:+.1%} to {-low:+.1%}) | "
        f"{large['at_least_half']} | {at[0]:.3f}, {at[1]:.3f} | {spikes[0]}, {spikes[1]} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a data file; default: the embedded text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--picture", type=Path, help="of the first seed, after as many updates")
    options = parser.parse_args()
    print(
        f"| seed | up to | variance, K=1 | K={K} | change (95 % interval) | at least -50 % | loss "
        "there | spikes |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    failed = False
    for seed in options.seeds:
        with tempfile.TemporaryDirectory(prefix="variance-") as place:
            folder, data = Path(place), options.data and options.data.resolve()
            large = train(folder, K, options.updates, seed, data)
            for axis, updates in (("updates", options.updates), ("samples", K * options.updates)):
                small = train(folder, 1, updates, seed, data)
                is_drawn = axis == "updates" and seed == options.seeds[0]
                found = compare(small, large, axis, options.picture if is_drawn else None)
                failed |= found["runs"][1]["at_least_half"] != "yes"
                print(row(seed, axis, found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
