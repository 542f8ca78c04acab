"""Memory of a long training: after 2,000 updates what it was after 100.

    python benchmarks/memory_over_time.py [--updates 2000] [--kinds single ddp zero2] [--trace]

Each kind is a real run of `train` on the CPU, of a Llama so small that anything kept per update
shows: many epochs, a checkpoint and an evaluation every 45 updates. Every process collects garbage,
gives freed memory back and reads its resident memory and the number of Python's objects, after 100
updates and ten times from there to the end. `--trace` names the lines whose allocations grew.

torch notes the last 2,000 exchanges of a process for whoever debugs a hang (its flight recorder),
which takes some MB once. Here it notes fewer, so that its notes are full before the first reading.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from accum_trainer.cli.train import parse
from accum_trainer.engine.memory import free_memory, memory_gb
from accum_trainer.train import updates
from tests.launching import Completed, python, torchrun

# name -> (processes, options of train)
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "ddp": (2, ()),
    "zero2": (2, ("--zero-stage", "zero2")),
}
# Exchanges that torch's flight recorder keeps: a process makes more than two per update.
NOTED = 200
FIRST = 100  # updates: caches are filled and the first checkpoints written
COMMAND = (
    *("--cpu", "--batch-size", "2", "--global-batch-size", "8", "--max-seq-len", "32"),
    *("--lr", "1e-3", "--checkpoint-every", "45", "--eval-every", "45", "--output-dir", "run"),
    *("--model", "model", "--dataset-file", "rows.jsonl", "--eval-file", "eval.jsonl"),
)
MODULE = "benchmarks.memory_over_time"


def worker(most: int, traced: bool, options: list[str]) -> None:
    """Train, and write what was measured to the folder, as one process of the job."""
    found: list[dict[str, float]] = []
    kinds: list[Counter[str]] = []
    due = [FIRST + number * (most - FIRST) // 10 for number in range(11)]
    device, before = torch.device("cpu"), None
    for record in updates(parse([*options, "--steps", str(most)]).config):
        if record["step"] not in due:
            continue
        free_memory(device)
        objects = gc.get_objects()
        measured = {"step": record["step"], "rss": memory_gb(device), "objects": len(objects)}
        found.append(measured)
        kinds.append(Counter(type(one).__name__ for one in objects))
        del objects
        if traced:
            before = before or _traced()
    rank = os.environ.get("RANK", "0")
    Path(f"memory-{rank}.json").write_text(json.dumps(found))
    grown = [(name, count) for name, count in (kinds[-1] - kinds[0]).most_common(5) if count > 50]
    print(f"rank {rank}: objects that became more: {grown}", file=sys.stderr)
    if before is not None:
        for line in tracemalloc.take_snapshot().compare_to(before, "lineno")[:12]:
            print(f"rank {rank}: {line}", file=sys.stderr)


def _traced() -> tracemalloc.Snapshot:
    tracemalloc.start(8)
    return tracemalloc.take_snapshot()


def prepare(folder: Path) -> None:
    """A model and rows."""
    from accum_trainer.data.embedded import corpus_tokenizer
    from tests.made_runs import small_llama, write_sums

    torch.manual_seed(0)
    small_llama().save_pretrained(folder / "model")
    corpus_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "rows.jsonl", 400)
    write_sums(folder / "eval.jsonl", 8)


def measure(
    kind: str, folder: Path, most: int = 2000, traced: bool = False
) -> tuple[list[list[dict[str, float]]], Completed]:
    """The measurements of each process, and how the run ended.

    Raises:
        RuntimeError: the run failed.
    """
    processes, options = KINDS[kind]
    prepare(folder)
    more: dict[str, Any] = {"cwd": folder, "timeout": 3600, "TORCH_FR_BUFFER_SIZE": NOTED}
    asked = ["--worker", str(most), *(["--trace"] if traced else []), "--", *COMMAND, *options]
    if processes == 1:
        ended = python("-m", MODULE, *asked, **more)
    else:
        ended = torchrun(processes, MODULE, *asked, **more)
    if ended.returncode != 0:
        raise RuntimeError(f"the run of {kind} failed: {ended.stderr[-3000:]}")
    files = [folder / f"memory-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files], ended


def table(kind: str, found: list[list[dict[str, float]]]) -> list[str]:
    """A line of Markdown per process."""
    lines = []
    for rank, points in enumerate(found):
        first, last = points[0], points[-1]
        lines.append(
            f"| {kind}, process {rank} | {first['rss'] * 1e3:.2f} | {last['rss'] * 1e3:.2f} | "
            f"{last['rss'] / first['rss'] - 1:+.2%} | {last['objects'] - first['objects']:+d} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("train", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.trace, options.train)
        return 0
    lines = [
        f"| | MB after {FIRST} updates | after {options.updates} | growth | objects |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="memory-over-time-") as place:
            found, ended = measure(kind, Path(place).resolve(), options.updates, options.trace)
        lines += table(kind, found)
        print("\n".join(lines[-len(found) :]), flush=True)
        for points in found:
            print("  MB:", *(f"{one['rss'] * 1e3:.2f}" for one in points), flush=True)
            print("  objects:", *(one["objects"] for one in points), flush=True)
        print("\n".join(x for x in ended.stderr.splitlines() if x.startswith("rank ")), flush=True)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
