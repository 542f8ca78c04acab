"""What it costs to measure the noise of the gradient, and how stable the noise scale is.

    python -m benchmarks.noise cost [--rounds 40] [--data FILE]
    python -m benchmarks.noise stability [--seeds 5] [--global-batch-size 32] [OPTIONS OF train]

cost: each window of a training runs twice, once in the cut that `train` uses and once cut at random
and measured; the median of the pairs' ratios of time, less 1, divided by the windows of which one
is measured by default, is the share of all time. The order within a pair alternates.
stability: whole runs of `train` on the embedded text that differ in their seed; the noise scale of
each at its end, with its interval.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from accum_trainer import TrainConfig, causal_lm_loss
from accum_trainer.train.setup import assemble
from accum_trainer.window import Window

CASES: dict[str, dict[str, Any]] = {
    "B 4 x K 1, packed": {"global_batch_size": 4},
    "B 4 x K 8, packed": {"global_batch_size": 32},
    "B 4 x K 8, padded": {"global_batch_size": 32, "layout": "padded"},
}


def cost_of(rounds: int, **options: Any) -> dict[str, float]:
    """Of one configuration: the default interval, and a measured window's time against another's.

    Args:
        rounds: pairs of windows, after two that warm up.
    """
    training = assemble(TrainConfig(cpu=True, steps=10**6, **options))
    acc = training.accumulator

    def seconds_of(window: Window, begun: float) -> float:
        for batch in window:
            with acc.accumulate(training.model):
                acc.backward(causal_lm_loss(training.model, batch))
        acc.step(training.optimizer)
        return time.perf_counter() - begun

    sources: list[Any] = [
        iter(
            acc.windows(
                copy.copy(training.rows),  # which has a position of its own
                collate_fn=training.prepared.collate,
                cut=training.prepared.cutting.cut,
                noise_every=every,
            )
        )
        for every in (0, 1)
    ]
    ratios = []
    for number in range(rounds + 2):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            window = next(sources[which])
            seconds[which] = seconds_of(window, time.perf_counter())
        ratios.append(seconds[1] / seconds[0])
    for source in sources:
        source.close()
    return {"every": training.noise_every, "ratio": statistics.median(ratios[2:])}


def cost(rounds: int, data: str | None) -> list[str]:
    cases = dict(CASES)
    if data is not None:
        name = Path(data).stem
        cases[f"{name}, B 4 x K 8, padded"] = CASES["B 4 x K 8, padded"] | {"dataset_file": data}
    lines = [
        f"Measured windows on the CPU, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {rounds} pairs of windows",
        "",
        "| windows | measured / ordinary | measured by default | share of all time |",
        "|---|---|---|---|",
    ]
    for name, options in cases.items():
        found = cost_of(rounds, **options)
        share = (found["ratio"] - 1) / found["every"]
        lines.append(
            f"| {name} | {found['ratio']:.3f} | one in {found['every']:.0f} | {share:.2%} |"
        )
        print(lines[-1], flush=True)
    return lines


def stability(seeds: int, size: int, more: list[str]) -> list[str]:
    lines = [
        f"Noise scale at the end of `accum-trainer train --global-batch-size {size}"
        f"{''.join(f' {option}' for option in more)}` on the embedded text, in samples",
        "",
        "| seed | noise scale | 95 % interval |",
        "|---|---|---|",
    ]
    found = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "accum_trainer", "train", "--cpu"]
            command += ["--global-batch-size", str(size), "--seed", str(seed)]
            command += ["--output-dir", f"{folder}/run", *more]
            subprocess.run(command, check=True, capture_output=True)
            last = json.loads(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])
        ends = [last["noise_scale_low"], last["noise_scale_high"]]
        shown = " to ".join("unknown" if end is None else f"{end:.1f}" for end in ends)
        scale = last["noise_scale"]
        lines.append(f"| {seed} | {'unknown' if scale is None else f'{scale:.1f}'} | {shown} |")
        print(lines[-1], flush=True)
        found.append(scale)
    known = [scale for scale in found if scale is not None]
    if len(known) > 1:
        lines += ["", f"Largest / smallest: {max(known) / min(known):.2f}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("cost", "stability"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--global-batch-size", type=int, default=32)
    options, more = parser.parse_known_args()
    if options.part == "cost":
        lines = cost(options.rounds, options.data)
    else:
        lines = stability(options.seeds, options.global_batch_size, more)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
