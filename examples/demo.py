"""`make demo`: one effective batch, three ways of making it.

Trains the embedded model on real text with B = 2: at K = 1, at K = 16, and at K = 8 on two
processes, 100 updates each. `accum-trainer compare` then shows the three side by side, in a table
and a picture. Needs no network and no GPU.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from accum_trainer.train.records import read_records

FOLDER = Path(os.environ.get("DEMO_FOLDER", "runs/demo"))
BIN = Path(sys.executable).parent
# The noise of the gradient is not measured: it keeps one more copy of it, and memory is compared.
# Packed, a window would need fewer than K micro-batches.
COMMON = (
    "--cpu --batch-size 2 --steps 100 --lr 1e-3 --warmup 10 --max-seq-len 128 --noise-every 0 "
    "--layout padded"
)
TRAIN = "accum-trainer train"
TWO = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no -m accum_trainer.train"
)
RUNS = {
    "k1": f"{TRAIN} {COMMON} --gradient-accumulation-steps 1",
    "k16": f"{TRAIN} {COMMON} --gradient-accumulation-steps 16",
    "k8-two-processes": f"{TWO} {COMMON} --gradient-accumulation-steps 8",
}
PICTURE = FOLDER / "comparison.png"

# glibc keeps freed memory for later by default; with these, resident memory follows what torch
# holds.
RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def run(command: str) -> None:
    """Run a command as a user would type it."""
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    finished = subprocess.run(
        [str(BIN / program), *arguments], env=os.environ | RETURN_FREED_MEMORY
    )
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    # The corpus and its tokenizer are made once, in a process of their own: what that takes is not
    # the first run's memory.
    subprocess.run(
        [str(BIN / "accum-trainer"), "train", *shlex.split(COMMON), "--dry-run"],
        check=True,
        capture_output=True,
    )
    for name, command in RUNS.items():
        run(f"{command} --output-dir {FOLDER / name}")
    folders = " ".join(str(FOLDER / name) for name in RUNS)
    run(f"accum-trainer compare {folders} -o {PICTURE}")

    small, large, split = (read_records(FOLDER / name / "metrics.jsonl") for name in RUNS)
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(large, split, strict=True))
    peaks = [max(record["peak_gb"] for record in records) for records in (small, large)]
    gradient = (
        json.loads((FOLDER / "k16" / "plan.json").read_text())["trained_parameters"] * 4 / 1e9
    )
    print(
        f"\npeak memory       K=1 {peaks[0]:.3f} GB, K=16 {peaks[1]:.3f} GB, {gradient:.3f} GB of "
        "it the gradient so far"
    )
    print(f"one process, two  the same 100 updates: losses at most {apart:.1e} apart (relative)")


if __name__ == "__main__":
    main()
