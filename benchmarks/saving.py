"""How long training waits for a checkpoint: its parts written in the background by every process,
against the whole state gathered and written by one.

    python benchmarks/saving.py [--engine ddp|fsdp2] [--pairs 3] [--millions 300]

Two processes, AdamW, interleaved. The peer is what this package did before, and what a loop around
`torch.save` does: every process gets the whole state, process 0 writes, hashes and syncs it, and
all wait.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from accum_trainer import Accumulator, causal_lm_loss
from accum_trainer.train.checkpoint import Snapshot
from accum_trainer.train.checkpoint_writer import CheckpointWriter
from benchmarks.gpu.models import llama
from tests.launching import run

SMALL, LARGE = (128, 500), (1024, 32000)  # hidden size, vocabulary


class Peak:
    """The most memory of this process above what it had, while inside; sampled."""

    def __enter__(self) -> Peak:
        gc.collect()
        if sys.platform == "linux":  # what earlier parts freed would be taken again unseen
            ctypes.CDLL(None).malloc_trim(0)
        self._process, self._ended = psutil.Process(), threading.Event()
        self._before = self.bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes -= self._before


def gathered(engine: Any, model: Any, optimizer: Any, folder: Path) -> None:
    """The whole state on every process, written by one."""
    weights = engine.full_weights(model, trained_only=True)
    state = engine.full_optimizer_state(model, optimizer.accelerated)

    def write() -> None:
        folder.mkdir(exist_ok=True)
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors")
        torch.save(state, folder / "optimizer.pt")
        for path in folder.iterdir():
            with open(path, "rb") as file:
                sha = hashlib.sha256()
                while block := file.read(1 << 20):
                    sha.update(block)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    engine.on_main(write)


def in_parts(engine: Any, model: Any, optimizer: Any, writer: CheckpointWriter, step: int) -> int:
    """Begin to write this process's part; its bytes."""
    parts = [part.on_host() for part in engine.own_parts(model, optimizer.accelerated)]
    groups = engine.optimizer_groups(optimizer.accelerated)
    snapshot = Snapshot(parts, engine.rng_state(), {"optimizer_groups": groups})
    writer.save(step, snapshot)
    return snapshot.nbytes


def worker(out: str, engine: str, pairs: int, millions: int) -> None:
    hidden, vocabulary = LARGE if millions >= 100 else SMALL
    layers = max(1, round((millions * 1e6 - 2 * hidden * vocabulary) / (12 * hidden**2)))
    model = llama(
        "1M", hidden_size=hidden, intermediate_size=int(8 / 3 * hidden), num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=vocabulary,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {"fsdp": True} if engine == "fsdp2" else {}
    acc = Accumulator(micro_batch_size=1, global_batch_size=2, cpu=True, **options)
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(2)]
    for window in acc.windows(rows):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        acc.step(optimizer)
    found: dict[str, list[float]] = {name: [] for name in ("whole", "parts", "written")}
    memory: dict[str, int] = {}
    own = 0
    with tempfile.TemporaryDirectory(prefix="saving-") as place:
        run_folder = Path(acc.engine.gather_objects(place)[0])
        writer = CheckpointWriter(acc.engine, run_folder, keep=1)
        for pair in range(pairs):
            acc.engine.barrier()
            with Peak() as peak:
                begun = time.perf_counter()
                gathered(acc.engine, model, optimizer, run_folder / "whole")
                found["whole"].append(time.perf_counter() - begun)
            memory["whole"] = max(memory.get("whole", 0), peak.bytes)
            acc.engine.barrier()
            with Peak() as peak:
                begun = time.perf_counter()
                own = in_parts(acc.engine, model, optimizer, writer, pair)
                found["parts"].append(time.perf_counter() - begun)
                assert not writer.wait()
                found["written"].append(time.perf_counter() - begun)
            memory["parts"] = max(memory.get("parts", 0), peak.bytes)
        acc.engine.barrier()
    result = {"times": found, "memory": memory, "own": own, "parameters": parameters}
    Path(out, f"rank{acc.engine.rank}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--millions", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saving-results-") as out:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
        given = ("benchmarks.saving", "--worker", out, options.engine)
        done = run(
            [sys.executable, *launcher, *given, options.pairs, options.millions], timeout=3000
        )
        if done.returncode != 0:
            sys.exit(done.stderr[-4000:])
        ranks = [json.loads(Path(out, f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print("\n".join(table(options.engine, ranks)))


def table(engine: str, ranks: list[dict[str, Any]]) -> list[str]:
    """Markdown: the longest wait of a process, and the most memory."""
    whole, parts, written = (
        [
            max(rank["times"][name][pair] for rank in ranks)
            for pair in range(len(ranks[0]["times"][name]))
        ]
        for name in ("whole", "parts", "written")
    )
    ratios = [b / a for a, b in zip(whole, parts, strict=True)]
    until = [b / a for a, b in zip(whole, written, strict=True)]
    own = max(rank["own"] for rank in ranks)
    shares = {n: max(rank["memory"][n] for rank in ranks) / own for n in ("whole", "parts")}
    millions = ranks[0]["parameters"] / 1e6
    return [
        f"{engine}, 2 processes, {millions:.0f}M parameters, AdamW, float32, {len(ratios)} pairs; "
        f"a process's own part is {own / 1e9:.2f} GB.",
        "",
        "| | training waits | until it is on disk | host memory beside training, over the part |",
        "| --- | --- | --- | --- |",
        f"| whole, by one process | 1 | 1 | {shares['whole']:.2f} |",
        f"| parts, in the background | {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}) | {statistics.median(until):.2f} | "
        f"{shares['parts']:.2f} |",
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
