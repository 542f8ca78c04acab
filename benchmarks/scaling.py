"""What a window costs before it is trained: planning it, and making one rank's micro-batches, by
B_eff and W.

    python benchmarks/scaling.py [--sizes 64 4096] [--ranks 1 8] [--out FILE.md] (about 5 minutes)

No process is started: a plan needs the lengths and W, and rank 0's part is made here as it would be
there. Lengths are skewed as instruction data are: log-normal, median 90 tokens, 99th percentile
1,700, at most 2,048.

Planning is `Cut(...).deal`, which every rank does for the whole window. Milliseconds are the least
of several runs, on whatever else the machine does; beside them stands how many times a stable
argsort of the same lengths (numpy, timed between the runs) they are, which another machine can
compare with. The exponent p says how the time grows, as B_eff**p or W**p: 1 is linear, 2 quadratic.

Making micro-batches is one window of `PlannedSource` with the padding collator, planning included,
against K x B samples of a DataLoader with a plain sampler (`RandomSampler`, or `DistributedSampler`
where W > 1), the same data set and collator: medians of pairs in turn. A data set in memory, whose
rows cost almost nothing, is where planning weighs most.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from accum_trainer import BatchPlan
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.sources.dataset import PlannedSource
from accum_trainer.sources.options import SourceOptions
from accum_trainer.window_plan import Cut

SIZES = (64, 256, 1024, 4096, 16384, 65536)
RANKS = (1, 8, 64, 1024)
B, MAX_TOKENS, LONGEST = 4, 8192, 2048
CUTS = {
    f"B={B}": Cut(B),
    f"max_tokens={MAX_TOKENS}": Cut(max_tokens=MAX_TOKENS),
    f"max_tokens={MAX_TOKENS}, equal counts": Cut(max_tokens=MAX_TOKENS, equal_counts=True),
    f"max_tokens={MAX_TOKENS}, packed": Cut(max_tokens=MAX_TOKENS, packed=True),
    "no limit": Cut(),
}
LOADED = (f"B={B}", f"max_tokens={MAX_TOKENS}")
PROMISED, PROMISED_MS = 4096, 20.0
TOO_LONG_SEC = 2.0  # larger windows of a kind that took this long are left out


def skewed_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of `count` samples; sigma from ln(1700 / 90) / 2.326, the normal distribution's 99th
    percentile."""
    drawn = np.random.RandomState(seed).normal(math.log(90), math.log(1700 / 90) / 2.326, count)
    return np.clip(np.exp(drawn), 4, LONGEST).astype(np.int64)


def seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def milliseconds(sec: float) -> str:
    """Three digits: `0.144`, `8.79`, `1,280`."""
    return f"{float(f'{1e3 * sec:.3g}'):,g}"


# --- planning ---


def planned(cut: Cut, size: int, world_size: int) -> tuple[float, float]:
    """Least time of a plan and of the argsort, in seconds, in turn."""
    lengths = skewed_lengths(size)
    best, argsort = math.inf, math.inf
    spent, runs = 0.0, 0
    while runs < 3 or (spent < 0.5 and runs < 50):
        argsort = min(argsort, seconds(lambda: np.argsort(-lengths, kind="stable")))
        took = seconds(lambda: cut.assign_to_ranks(lengths, world_size))
        best, spent, runs = min(best, took), spent + took, runs + 1
        if took > TOO_LONG_SEC:
            break
    return best, argsort


def memory(cut: Cut, size: int, world_size: int) -> tuple[int, int]:
    """Bytes that a plan keeps, and most that making it took."""
    lengths = skewed_lengths(size)
    gc.collect()
    tracemalloc.start()
    dealt = cut.assign_to_ranks(lengths, world_size)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(part) for own in dealt for part in own) == size
    return kept, peak


def plan_tables(sizes: list[int], ranks: list[int]) -> list[str]:
    lines = [
        f"| cut | B_eff | {' | '.join(f'W={w:,}, ms (x argsort)' for w in ranks)} | p in W, last "
        "two |",
        f"|---|---|{'---|' * (len(ranks) + 1)}",
    ]
    verdicts = []
    growth: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for name, cut in CUTS.items():
        took: dict[tuple[int, int], float] = {}
        for size in sizes:
            cells = []
            for w in ranks:
                if max((took[s, w] for s in sizes if (s, w) in took), default=0.0) > TOO_LONG_SEC:
                    cells.append("not run")
                    continue
                best, argsort = planned(cut, size, w)
                took[size, w] = best
                cells.append(f"{milliseconds(best)} ({best / argsort:,.0f})")
                growth.setdefault(name, {}).setdefault(w, []).append((size, best))
            last = [(w, took[size, w]) for w in ranks if (size, w) in took]
            lines.append(f"| {name} | {size:,} | {' | '.join(cells)} | {exponent(last)} |")
            if size == PROMISED:
                verdicts += [
                    f"{name}: W={w:,} {milliseconds(took[size, w])} ms"
                    for w in ranks
                    if (size, w) in took and 1e3 * took[size, w] >= PROMISED_MS
                ]
    for name, by_rank in growth.items():
        cells = [exponent(by_rank.get(w, [])) for w in ranks]
        lines.append(f"| {name} | p in B_eff, last two | {' | '.join(cells)} | |")
    if PROMISED in sizes:
        said = f"over it: {'; '.join(verdicts)}" if verdicts else "met by every cut and W above"
        lines += [
            "",
            f"Promised: B_eff = {PROMISED:,} planned in under {PROMISED_MS:.0f} ms; {said}.",
        ]
    return lines


def exponent(points: list[tuple[int, float]]) -> str:
    """p of time = c * x**p between the last two points."""
    if len(points) < 2:
        return ""
    (x, a), (y, b) = points[-2:]
    return f"{math.log(b / a) / math.log(y / x):.2f}"


def memory_table(sizes: list[int], ranks: list[int]) -> list[str]:
    """Of the two ends of W; cuts that take seconds to plan are left out."""
    ends = sorted({ranks[0], ranks[-1]})
    lines = [
        f"| cut | B_eff | {' | '.join(f'plan, W={w:,}: kept KB (peak KB)' for w in ends)} |",
        f"|---|---|{'---|' * len(ends)}",
    ]
    for name in LOADED:
        for size in sizes:
            cells = []
            for w in ends:
                if (
                    seconds(
                        lambda n=size, w=w, cut=CUTS[name]: cut.assign_to_ranks(
                            skewed_lengths(n), w
                        )
                    )
                    > TOO_LONG_SEC
                ):  # type: ignore[misc]
                    cells.append("not run")
                    continue
                kept, peak = memory(CUTS[name], size, w)
                cells.append(f"{kept / 1e3:.0f} ({peak / 1e3:.0f})")
            lines.append(f"| {name} | {size:,} | {' | '.join(cells)} |")
    return lines


# --- this rank's micro-batches ---


class Rows:
    """A data set in memory: row i is a slice of one list, as long as `lengths` says."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self._sizes = lengths.tolist()
        self._tokens = [i % 1000 for i in range(LONGEST)]

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._tokens[: self._sizes[index]]
        return {"input_ids": ids, "labels": ids}


def loaded(cut: Cut, size: int, world_size: int, pairs: int) -> dict[str, float]:
    """Medians over windows of `size` samples, in seconds: rank 0's part, its plan alone, and a
    plain loader's K x B samples; and the bytes that the part holds."""
    lengths = skewed_lengths((pairs + 1) * size)
    rows = Rows(lengths)
    k = size // (B * world_size)
    collate = PaddingCollator(pad_token_id=0)
    options = SourceOptions(collate_fn=collate, cut=cut)
    source = PlannedSource(rows, BatchPlan(B, k, world_size), 0, options)
    sampler: Any = RandomSampler(rows, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    if world_size > 1:
        sampler = DistributedSampler(rows, world_size, 0)  # type: ignore[arg-type]
    loader: DataLoader = DataLoader(rows, B, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
    parts, plain = source.shares(0, 0), iter(loader)
    held: list[float] = []

    def ours() -> None:
        part = next(parts)
        held.append(sum(tensor.nbytes for batch in part.batches for tensor in batch.values()))

    def theirs() -> list[Any]:
        return [next(plain) for _ in range(k)]  # held as a window's are

    took: list[tuple[float, float, float]] = []
    for pair in range(pairs + 1):
        if pair % 2:
            other, mine = seconds(theirs), seconds(ours)
        else:
            mine, other = seconds(ours), seconds(theirs)
        window = lengths[pair * size : (pair + 1) * size]
        if pair:  # the first ones start the iterators
            took.append((mine, seconds(lambda w=window: cut.assign_to_ranks(w, world_size)), other))  # type: ignore[misc]
    mine, plan, other = (statistics.median(column) for column in zip(*took, strict=True))
    ratio = statistics.median(mine / other for mine, _, other in took)
    return {
        "ours": mine,
        "plan": plan,
        "plain": other,
        "ratio": ratio,
        "held": statistics.median(held),
    }


def loader_table(sizes: list[int], ranks: list[int]) -> list[str]:
    lines = [
        "| cut | B_eff | W | K | rank 0's window, ms | of it planning | plain DataLoader, ms | "
        "ratio | held for the window, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, size, w in _loader_cells(sizes, ranks):
        found = loaded(CUTS[name], size, w, pairs=4 if size >= 16384 else 9)
        ours, plan, plain = (milliseconds(found[key]) for key in ("ours", "plan", "plain"))
        lines.append(
            f"| {name} | {size:,} | {w:,} | {size // (B * w):,} | {ours} | {plan} | {plain} | "
            f"{found['ratio']:.2f} | {found['held'] / 1e6:.2f} |"
        )
    return lines


def _loader_cells(sizes: list[int], ranks: list[int]) -> Iterator[tuple[str, int, int]]:
    """Windows that fill each rank with a micro-batch of B, and are planned in a time that can be
    waited for."""
    for name in LOADED:
        for size in sizes:
            for w in ranks:
                if (
                    size % (B * w) == 0
                    and seconds(
                        lambda n=size, w=w, c=CUTS[name]: c.assign_to_ranks(skewed_lengths(n), w)
                    )
                    < 1
                ):  # type: ignore[misc]
                    yield name, size, w


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="B_eff")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="W")
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, ranks, loads = options.sizes, options.ranks, [os.getloadavg()[0]]
    tables = {
        "Time to plan a window, the same on every rank:": plan_tables(sizes, ranks),
        "Memory of a plan:": memory_table(sizes, ranks),
        "Time to make rank 0's micro-batches of a window, planning included:": loader_table(
            sizes, ranks
        ),
    }
    loads.append(os.getloadavg()[0])
    quiet = (
        "quiet"
        if max(loads) < 1.5
        else "not quiet: milliseconds are of little worth, ratios and exponents hold better"
    )
    lines = [
        "Planning and making windows: skewed lengths (log-normal, median 90, p99 1,700, at most "
        f"{LONGEST:,} tokens), one thread, CPU, {platform.machine()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}. Load of "
        f"the machine {loads[0]:.1f} at the start and {loads[1]:.1f} at the end on "
        f"{os.cpu_count()} cores ({quiet})",
    ]
    for title, table in tables.items():
        lines += ["", title, "", *table]
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
