"""`make demo`: one effective batch, three ways of making it.

Trains the embedded model on real text with B = 2: at K = 1, at K = 16, and at K = 8 on two
processes, 100 updates each. Leaves one picture of the three loss curves, and says in a few lines
what it shows. Needs no network and no GPU.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from accum_trainer.train.loss_picture import draw_loss
from accum_trainer.train.records import read_records

FOLDER = Path(os.environ.get("DEMO_FOLDER", "runs/demo"))
BIN = Path(sys.executable).parent
COMMON = "--cpu --batch-size 2 --steps 100 --lr 1e-3 --warmup 10 --max-seq-len 128"
TRAIN = "accum-trainer train"
TWO = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no -m accum_trainer.train"
)
RUNS = {
    "B 2 x K 1 x W 1 = 2": ("k1", f"{TRAIN} {COMMON} --gradient-accumulation-steps 1"),
    "B 2 x K 16 x W 1 = 32": ("k16", f"{TRAIN} {COMMON} --gradient-accumulation-steps 16"),
    "B 2 x K 8 x W 2 = 32": ("k8-two-processes", f"{TWO} {COMMON} --gradient-accumulation-steps 8"),
}

# glibc keeps freed memory for later by default; with these, resident memory follows what torch
# holds.
RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def train(name: str, command: str) -> list[dict]:
    """Run one training as a user would type it; return its records."""
    command += f" --output-dir {FOLDER / name}"
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    finished = subprocess.run(
        [str(BIN / program), *arguments], env=os.environ | RETURN_FREED_MEMORY
    )
    if finished.returncode:
        sys.exit(finished.returncode)
    return read_records(FOLDER / name / "metrics.jsonl")


def variance_around_trend(records: list[dict]) -> float:
    """Half the mean squared difference of neighbouring losses: the variance of the noise, whatever
    the trend."""
    losses = [record["loss"] for record in records]
    return sum((b - a) ** 2 for a, b in pairwise(losses)) / (2 * (len(losses) - 1))


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    # The corpus and its tokenizer are made once, in a process of their own: what that takes is not
    # the first run's memory.
    subprocess.run(
        [str(BIN / "accum-trainer"), "train", *shlex.split(COMMON), "--dry-run"],
        check=True,
        capture_output=True,
    )
    runs = {label: train(name, command) for label, (name, command) in RUNS.items()}
    draw_loss(runs, FOLDER / "loss.png", "The effective batch decides the curve, not how it is cut")
    small, large, split = runs.values()
    noise_small, noise_large = variance_around_trend(small), variance_around_trend(large)
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(large, split, strict=True))
    peaks = [max(record["peak_gb"] for record in run) for run in (small, large)]
    gradient = (
        json.loads((FOLDER / "k16" / "plan.json").read_text())["trained_parameters"] * 4 / 1e9
    )
    print(
        f"\nloss variance     K=1 {noise_small:.4f}, K=16 {noise_large:.4f}: down by "
        f"{1 - noise_large / noise_small:.0%}"
    )
    print(
        f"peak memory       K=1 {peaks[0]:.3f} GB, K=16 {peaks[1]:.3f} GB, {gradient:.3f} GB of it "
        "the gradient so far"
    )
    print(f"one process, two  the same 100 updates: losses at most {apart:.1e} apart (relative)")
    print(f"picture           {FOLDER / 'loss.png'}")


if __name__ == "__main__":
    main()
