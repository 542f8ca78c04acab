"""What it saves to make logits only where there are targets, and few at a time.

    python benchmarks/loss_path.py [--pairs 9] [--tokens 200] [--out FILE.md]

One micro-batch's forward and backward of a two-layer Llama with SmolLM's width and vocabulary (576,
49,152), B=8, on the paths of `accum_trainer.losses.head`. Time: in turn in one process, the median
of each round's ratios to the plain path; freed memory stays with the process, as in `overhead.py`.
Memory: each path alone in a process, the most that is resident less what is resident before the
first micro-batch (weights); the gradients are in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

from accum_trainer import causal_lm_loss
from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak
from accum_trainer.losses.head import LossPath, set_loss_path
from accum_trainer.losses.patched_head import CHUNKED, PLAIN, SELECTED
from benchmarks.overhead import KEEP_FREED_MEMORY, RETURN_FREED_MEMORY

B, TARGETS = 8, 0.6
VOCABULARY, HIDDEN = 49_152, 576
PATHS = (PLAIN, SELECTED, CHUNKED)
CPU = torch.device("cpu")


def subject(tokens: int, tied: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model, and a micro-batch with the first 40 % of each row masked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )
    ids = torch.randint(1, VOCABULARY, (B, tokens))
    labels = ids.clone()
    labels[:, : int(tokens * (1 - TARGETS))] = -100
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(model: torch.nn.Module, batch: dict[str, torch.Tensor], path: str) -> tuple[float, float]:
    """(seconds, loss) of one forward and backward on one path."""
    set_loss_path(model, LossPath(path, "forced"))
    begun = time.perf_counter()
    loss = causal_lm_loss(model, batch)
    (loss / 1000).backward()
    return time.perf_counter() - begun, loss.item()


def peak(path: str, tokens: int) -> float:
    """Peak memory in GB above the model's, of one path alone in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", path, "--tokens", str(tokens)]
    env = os.environ | RETURN_FREED_MEMORY
    return float(
        subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[
            -1
        ]
    )


def measure_peak(path: str, tokens: int) -> None:
    model, batch = subject(tokens, tied=True)
    before = memory_gb(CPU)
    reset_peak(CPU)
    for _ in range(2):  # the second adds to gradients that are there
        run(model, batch, path)
    print(peak_gb(CPU) - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out")
    parser.add_argument("--peak-of", choices=PATHS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        return measure_peak(options.peak_of, options.tokens)
    if (
        os.environ.get("MALLOC_TRIM_THRESHOLD_") is None
    ):  # read when a process starts, so start again
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)

    model, batch = subject(options.tokens, tied=True)
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    losses = {}
    for round in range(options.pairs + 1):
        for path in PATHS if round % 2 else reversed(PATHS):
            seconds, losses[path] = run(model, batch, path)
            if round:  # the first allocates
                times[path].append(seconds)
    lines = [
        f"Loss paths: B={B}, {options.tokens} tokens, {TARGETS:.0%} targets, vocabulary "
        f"{VOCABULARY:,}, two layers of {HIDDEN}, CPU, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {platform.machine()}, {options.pairs} rounds",
        "",
        "| path | seconds | time / plain | peak GB above the weights | peak / plain | loss - plain "
        "(relative) |",
        "|---|---|---|---|---|---|",
    ]
    memory = {path: peak(path, options.tokens) for path in PATHS}
    for path in PATHS:
        ratio = statistics.median(a / b for a, b in zip(times[path], times[PLAIN], strict=True))
        difference = abs(losses[path] - losses[PLAIN]) / losses[PLAIN]
        lines.append(
            f"| {path} | {statistics.median(times[path]):.2f} | {ratio:.3f} | {memory[path]:.2f} | "
            f"{memory[path] / memory[PLAIN]:.3f} | {difference:.0e} |"
        )
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
