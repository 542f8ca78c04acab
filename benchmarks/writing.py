"""Host memory of a machine while a run's end writes the model: what the processes hold beside the
trained state, all together.

    python benchmarks/writing.py [--engine fsdp2 zero2] [--processes 2 4] [--size 0.5B]

A Llama in float32 is prepared on the CPU, and its weights are gathered as for model/, against whole
on every process. Memory is what no file backs, sampled every 5 ms, less what was held before, as a
multiple of the model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.models import SIZES, llama
from benchmarks.host_memory import linger, most_held, wait_to_begin

WAYS = ("everywhere", "main")
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": True},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}


def gather(folder: Path, size: str, engine: str, way: str) -> None:
    """One of the processes: gather, when told to."""
    import torch

    from accum_trainer import Accumulator
    from accum_trainer.train.gathered_weights import gathered_weights

    acc = Accumulator(
        micro_batch_size=1, gradient_accumulation_steps=1, cpu=True, **ENGINES[engine]
    )
    model = llama(size)
    model, _ = acc.prepare(model, torch.optim.AdamW(model.parameters()))
    wait_to_begin(folder, acc.engine)
    if way == "everywhere":
        assert acc.engine.full_weights(model)
    else:
        with gathered_weights(acc.engine, model, folder, False, None) as (weights, failure):
            assert not failure and (weights is not None) == acc.engine.is_main
    linger(acc.engine)


def measure(processes: int, size: str, engine: str, way: str) -> int:
    """The most that was held beside what was held before."""
    with tempfile.TemporaryDirectory() as name:
        arguments = ("--folder", name, "--size", size, "--engine", engine, "--way", way)
        return most_held(Path(name), processes, "benchmarks.writing", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["fsdp2", "zero2"])
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        gather(options.folder, options.size, options.engine[0], options.way)
        return
    size = sum(p.numel() * p.itemsize for p in llama(options.size).parameters())
    print(f"A Llama of {size / 4e6:.0f}M parameters, {size / 1e9:.2f} GB in float32, CPU")
    print("\n| engine | processes | whole on every process, x model | on the main one, x model |")
    print("|---|---|---|---|")
    for engine in options.engine:
        for processes in options.processes:
            most = [measure(processes, options.size, engine, way) / size for way in WAYS]
            figures = " | ".join(f"{one:.2f}" for one in most)
            print(f"| {engine} | {processes} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
