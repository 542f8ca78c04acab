"""Peak memory: against K, for each engine; and against the trainers that people use, at the same B
and K.

    python -m benchmarks.memory [--engines single ddp zero2 fsdp2]
    python -m benchmarks.memory --peers trainer trl [--data FILE.jsonl] [--model DIR] [--k 8]

Against K it is what torch's allocator hands out and gets back in one update, measured as
`benchmarks/footprint.py` says: the figure of `torch.cuda.max_memory_allocated`. Against peers each
loop of `benchmarks/ragged.py` runs two updates on the same samples, alone in a process of its own:
peak resident memory above what the process held before, with the model's weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak
from benchmarks import footprint, ragged
from benchmarks.overhead import RETURN_FREED_MEMORY

KS = (1, 2, 8, 16)
RUNS = 3


def against_k(engines: list[str]) -> dict[str, dict[int, float]]:
    """Peak bytes per process in the last of three updates (K = 1: of four), by engine and K."""
    names = {f"{engine}, K={k}": (engine, k) for engine in engines for k in KS}
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(sys.stderr):
        folder = Path(made)
        footprint.make_files(folder)
        measured = footprint.launch(folder, list(names))
    peaks: dict[str, dict[int, float]] = {engine: {} for engine in engines}
    for name, (engine, k) in names.items():
        peaks[engine][k] = measured[name].peak
    return peaks


def against_peer(options: argparse.Namespace, which: str) -> float:
    """Peak in 10^9 bytes of one loop: median of RUNS processes."""
    command = [sys.executable, "-m", "benchmarks.memory", "--peak-of", which, "--k", str(options.k)]
    command += ["--max-seq-len", str(options.max_seq_len)]
    for name in ("data", "model"):
        if getattr(options, name):
            command += [f"--{name}", getattr(options, name)]
    found = []
    for _ in range(RUNS):
        done = subprocess.run(
            command,
            env=os.environ | RETURN_FREED_MEMORY,
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(float(done.stdout.split()[-1]))
    return statistics.median(found)


def peak_of(options: argparse.Namespace) -> None:
    """Print the peak of one loop, in this process."""
    model, tokenizer, rows = ragged.load(options)
    order = ragged.choose(rows, 4 * ragged.B * options.k, False)
    loop = ragged.make_loop(options.peak_of, model, tokenizer, rows, options.k, order)
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    )  # were there before; counted in
    cpu = torch.device("cpu")
    before = memory_gb(cpu)
    reset_peak(cpu)
    for _ in range(2):
        next(loop)
    print(peak_gb(cpu) - before + weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=["single", "ddp", "zero2", "fsdp2"])
    parser.add_argument("--peers", nargs="+", choices=ragged.LABELS)
    parser.add_argument("--data", help="rows for training; default: the embedded corpus")
    parser.add_argument(
        "--model", help="a folder that from_pretrained loads; default: a Llama of 5M parameters"
    )
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.peak_of:
        return peak_of(options)
    machine = f"CPU, {os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}"
    if options.peers:
        mine = against_peer(options, "ours")
        print(
            f"{options.data or 'embedded corpus'}, {options.model or 'Llama of 5M'}, B={ragged.B}, "
            f"K={options.k}, {machine}"
        )
        print("\n| peer | peak, ours over theirs | GB |\n|---|---|---|")
        for peer in options.peers:
            theirs = against_peer(options, peer)
            print(f"| {ragged.LABELS[peer]} | {mine / theirs:.3f} | {mine:.3f} / {theirs:.3f} |")
        return
    peaks = against_k(options.engines)
    print(f"Llama of 9M parameters, B={footprint.BATCH}, {footprint.TOKENS} tokens, {machine}")
    print(
        "\n| engine | "
        + " | ".join(f"K={k}, MB" for k in KS)
        + " | K=16 over K=2 |\n"
        + "|---" * (len(KS) + 2)
        + "|"
    )
    for engine, by_k in peaks.items():
        figures = " | ".join(f"{by_k[k] / 1e6:.1f}" for k in KS)
        print(f"| {engine} | {figures} | {by_k[16] / by_k[2]:.4f} |")


if __name__ == "__main__":
    main()
