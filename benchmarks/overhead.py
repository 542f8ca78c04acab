"""What the exactness costs: our loop against the loops that people write, on the same
micro-batches.

    python benchmarks/overhead.py [--pairs 40] [--peers hand accelerate fabric] [--out FILE.md]

`hand` is torch alone, exact; `accelerate` the loop of accelerate's guide "Performing gradient
accumulation", `fabric` that of Lightning Fabric's "Efficient Gradient Accumulation", each with
clipping; both average micro-batches, so they do a little less.

Time: two loops train equal models in one process, window by window in turn, the first of each pair
alternating; the figure is the median of the pairs' ratios. Freed memory stays with the process:
glibc would hand the logits back to the kernel after each micro-batch, and which of two loops pays
for that is chance. Memory: each loop alone in a process of its own, peak resident memory, median of
three. The hand-written loop knows the window's number of targets for nothing; ours counts them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F

from accum_trainer import Accumulator, TrainConfig, causal_lm_loss
from accum_trainer.data.embedded import corpus_files
from accum_trainer.data.files import digest, read_file
from accum_trainer.data.tokenizing import tokenize
from accum_trainer.engine.memory import peak_gb, reset_peak
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.sources.collating import PaddingCollator

B, MAX_NORM, LENGTH = 4, 1.0, 256
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
}


def micro_batches(number: int) -> tuple[torch.nn.Module, list[dict]]:
    """The embedded model and `number` micro-batches of the embedded rows, all of one size so that
    pairs compare."""
    config = TrainConfig(max_seq_len=LENGTH)
    tokenizer = load_tokenizer(config)
    path = corpus_files()[0]
    rows = tokenize(read_file(path), "embedded corpus", digest(path), tokenizer, LENGTH)
    longest = [rows[int(i)] for i in (-rows.lengths).argsort(kind="stable")[: 4 * number]]
    torch.manual_seed(0)
    collate = PaddingCollator(tokenizer.pad_token_id)
    return load_model(config, tokenizer), [collate(longest[i::number][:B]) for i in range(number)]


def ours(model: torch.nn.Module, batches: list[dict], k: int) -> Iterator[float]:
    """One update per `next`."""
    acc = Accumulator(
        micro_batch_size=B, gradient_accumulation_steps=k, max_grad_norm=MAX_NORM, cpu=True
    )
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    windows = acc.windows(batches[i % len(batches)] for i in range(10**9))
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        yield acc.step(optimizer).loss


def by_hand(model: torch.nn.Module, batches: list[dict], k: int) -> Iterator[float]:
    """The same update as people write it who know how: summed loss over the window's targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    at = 0
    while True:
        window = [(at + i) % len(batches) for i in range(k)]
        at += k
        targets = sum(counts[i] for i in window)
        total = torch.zeros(())
        for i in window:
            batch = batches[i]
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
            loss = (
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / targets
            )
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield total.item()


def with_accelerate(model: torch.nn.Module, batches: list[dict], k: int) -> Iterator[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=k, cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    for at in count():
        with accelerator.accumulate(model):
            loss = model(**batches[at % len(batches)]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if (at + 1) % k == 0:
            yield loss.item()


def with_fabric(model: torch.nn.Module, batches: list[dict], k: int) -> Iterator[float]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    for at in count():
        is_accumulating = (at + 1) % k != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = model(**batches[at % len(batches)]).loss
            fabric.backward(loss / k)
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


PEERS = {
    "hand": ("hand-written", by_hand),
    "accelerate": ("accelerate's loop", with_accelerate),
    "fabric": ("Lightning Fabric's", with_fabric),
}


def timed(loop: Iterator[float]) -> float:
    begun = time.perf_counter()
    next(loop)
    return time.perf_counter() - begun


def paired(
    first: Callable[[], float], second: Callable[[], float], pairs: int
) -> tuple[float, float, float]:
    """Median, lower and upper quartile of first/second over interleaved pairs."""
    ratios = []
    for pair in range(pairs + 2):
        times = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which] = (first, second)[which]()
        if pair >= 2:  # the first of each allocates
            ratios.append(times[0] / times[1])
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, low, high


def peak(which: str, k: int) -> float:
    """Peak memory in GB of one loop, alone in a process of its own: median of three."""
    command = [sys.executable, __file__, "--peak-of", which, "--k", str(k)]
    env = os.environ | RETURN_FREED_MEMORY  # resident memory then follows what torch holds
    found = [
        float(
            subprocess.run(
                command, env=env, check=True, capture_output=True, text=True
            ).stdout.split()[-1]
        )
        for _ in range(3)
    ]
    return statistics.median(found)


def measure_peak(which: str, k: int) -> None:
    model, batches = micro_batches(16)
    loop = (ours if which == "ours" else by_hand)(model, batches, k)
    reset_peak(torch.device("cpu"))
    for _ in range(max(2, 32 // k)):
        next(loop)
    print(peak_gb(torch.device("cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out")
    parser.add_argument("--peak-of", choices=("ours", "hand"), help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, default=16, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        return measure_peak(options.peak_of, options.k)

    if (
        os.environ.get("MALLOC_TRIM_THRESHOLD_") is None
    ):  # read when a process starts, so start again
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)

    model, batches = micro_batches(16)
    rows = []
    for name, peer in (PEERS[peer] for peer in options.peers):
        for k in (1, 16):
            a, b = ours(copy.deepcopy(model), batches, k), peer(copy.deepcopy(model), batches, k)
            pairs = options.pairs if k > 1 else options.pairs * 4
            found = paired(partial(timed, a), partial(timed, b), pairs)
            rows.append((f"time of an update, ours / {name}, K={k}", *found))
    one, sixteen = ours(copy.deepcopy(model), batches, 1), ours(copy.deepcopy(model), batches, 16)

    def sixteen_updates() -> float:
        return sum(timed(one) for _ in range(16))

    rows.append(
        (
            "time of a micro-batch, ours K=16 / ours K=1",
            *paired(partial(timed, sixteen), sixteen_updates, options.pairs),
        )
    )
    losses = [
        next(ours(copy.deepcopy(model), batches, 16)),
        next(by_hand(copy.deepcopy(model), batches, 16)),
    ]
    memory = {(which, k): peak(which, k) for which, k in (("ours", 1), ("ours", 16), ("hand", 16))}
    lines = [
        f"Loop overhead: embedded model (1.3M), B={B}, {LENGTH} tokens, CPU, "
        f"{torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {platform.machine()}, {options.pairs} interleaved pairs",
        "",
        "| figure | median | quartiles |",
        "|---|---|---|",
        *(
            f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} |"
            for name, median, low, high in rows
        ),
        f"| peak memory, ours / hand-written, K=16 | {memory['ours', 16] / memory['hand', 16]:.3f} "
        "| |",
        f"| peak memory, ours K=16 / ours K=1 | {memory['ours', 16] / memory['ours', 1]:.3f} | |",
        "| first loss, ours - hand-written (relative) | "
        f"{abs(losses[0] - losses[1]) / losses[1]:.1e} | |",
    ]
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")
    print(json.dumps({name: median for name, median, _, _ in rows}), file=sys.stderr)


if __name__ == "__main__":
    main()
