"""What waiting for data costs: our loop against the plain Accelerate loop, over a DataLoader with
workers.

    python benchmarks/loader.py [--pairs 3] [--windows 40] [--out FILE.md]

The model waits in each forward, as for a device, and the data set before it gives a sample, as for
a disk: so long that the workers need `load` times what a micro-batch takes: at 0.9 the plain loop
just never waits. So only waiting is measured, and a processor that is busy with other things
changes little. A window can begin only once all its micro-batches are there, because their targets
are counted first; what hides this is reading the next window while one is trained on. The first
window of an epoch cannot be hidden: 1 / windows of an epoch at worst, part of the figure.

Two loops train equal models in one process, epoch by epoch in turn, the first of each pair
alternating; the figure is the median of the pairs' ratios. Both begin each epoch with new workers,
unless these are persistent.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from accum_trainer import Accumulator, causal_lm_loss

B, K, WORKERS, LENGTH = 4, 16, 2, 8
TARGETS = B * (LENGTH - 1)


class Slow:
    """Samples that take `seconds` each to read."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        ids = torch.arange(index, index + LENGTH) % 255 + 1
        return {"input_ids": ids, "labels": ids}


class Waiting(torch.nn.Module):
    """A small Llama whose forward takes `seconds` more."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        self.inner, self.seconds = LlamaForCausalLM(config), seconds

    def forward(self, **batch: torch.Tensor) -> Any:
        time.sleep(self.seconds)
        return self.inner(**batch)


class SlowStream(IterableDataset):
    """The same as a stream, each worker with its share."""

    def __init__(self, rows: Slow) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return (self.rows[i] for i in range(worker.id, len(self.rows), worker.num_workers))


def ours(model: torch.nn.Module, make: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    """One epoch per call."""
    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K, cpu=True)
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    batches = acc.batches(make())

    def epoch() -> None:
        for batch in batches:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def plain(model: torch.nn.Module, make: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=K, cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-4), make()
    )

    def epoch() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(causal_lm_loss(model, batch) / TARGETS)
                optimizer.step()
                optimizer.zero_grad()

    return epoch


def timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def paired(
    first: Callable[[], None], second: Callable[[], None], pairs: int
) -> tuple[float, float, float]:
    """Median, least and greatest of first/second over interleaved pairs."""
    ratios = []
    for pair in range(pairs + 1):
        times = {
            which: timed(which) for which in ((first, second) if pair % 2 == 0 else (second, first))
        }
        if pair:  # the first allocates
            ratios.append(times[first] / times[second])
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--milliseconds", type=float, default=10.0, help="that a micro-batch waits")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=[0.9, 0.5],
        help="of workers, in micro-batches' time",
    )
    parser.add_argument("--kinds", nargs="+", default=["data set", "persistent workers", "stream"])
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Waiting(options.milliseconds / 1e3)
    lines = [
        f"Waiting for data: {WORKERS} workers, B={B}, K={K}, {options.windows} windows, a "
        f"micro-batch of {options.milliseconds:g} ms, torch {torch.__version__}, "
        f"{platform.machine()}, {options.pairs} interleaved pairs of epochs",
        "",
        "| time of an epoch, ours / accelerate's loop | median | least to greatest |",
        "|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for kind in options.kinds:
        for load in options.load:
            rows = Slow(options.windows * K * B, load * model.seconds * WORKERS / B)
            data: Any = SlowStream(rows) if kind == "stream" else rows
            make = partial(
                DataLoader,
                data,
                batch_size=B,
                num_workers=WORKERS,
                persistent_workers=kind == "persistent workers",
            )
            median, least, greatest = paired(
                ours(copy.deepcopy(model), make), plain(copy.deepcopy(model), make), options.pairs
            )
            lines.append(f"| {kind}, load {load} | {median:.3f} | {least:.3f} to {greatest:.3f} |")
            print(lines[-1], flush=True)
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
