"""How far each update is from one float64 big batch: ours and the peers as their own documentation
uses them.

    python benchmarks/exactness.py [--peers ours trainer ...] [--out FILE.md]
    (about 3 minutes on 2 cores)

Needs `pip install lightning trl` for those two rows; a peer that is not installed, or fails, says
so in its own row. All loops (in `exactness_peers.py`) read the same ragged rows in the same order:
three whole windows of B x K x W rows and an uneven last one, in one process and in two under DDP
over gloo. Just before each step the gradient is compared with the one that a single float64 batch
of that window's rows gives at the same weights; the figure is the norm of the difference over all
parameters relative to the norm of the exact gradient, the worst of both processes. Rows that a peer
repeats, leaves out or trains in another window are counted where they enter the model.

The exact gradient averages over targets, so what a peer is off by depends on the rows: the more
ragged, the further off is a mean of means; the more rows without a masked prompt, the further off
is one who counts the first label; the fewer rows in the last window, the further off is one who
fills it up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from exactness_peers import (
    IGNORE,
    PEERS,
    WHOLE,
    B,
    K,
    big_batch,
    make_model,
    make_windows,
    relative_error,
)

KINDS = {"llama": "Llama", "gpt2": "GPT-2"}
WORLD_SIZES = (1, 2)
CELLS = [(kind, world_size) for kind in KINDS for world_size in WORLD_SIZES]
TIMEOUT_SEC = 120


@dataclass
class Outcome:
    """One peer on one architecture in W processes: a cell of the table, and what there is to say of
    it."""

    cell: str
    notes: list[str] = field(default_factory=list)


def environment() -> dict[str, str]:
    """This process's environment without what a launcher left in it, offline and on one thread per
    process."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in launchers and not k.startswith("ACCELERATE_")
    }
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


def run(peer: str, kind: str, world_size: int) -> Outcome:
    """Start one loop in processes of its own, as a user does, and judge what it did."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    script = str(Path(__file__).with_name("exactness_peers.py"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = [script, peer, kind, f"{folder}/result"]
        process = subprocess.Popen(
            [sys.executable, *(launcher if world_size > 1 else []), *arguments],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, complaint = process.communicate(timeout=TIMEOUT_SEC)
        except subprocess.TimeoutExpired:
            stop(process)
            return Outcome("failed", [f"did not end within {TIMEOUT_SEC} s"])
        if process.returncode != 0:
            return Outcome("failed", [reason(complaint)])
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("result-*.json")]
    return judge(ranks, world_size)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and what it launched: a launcher does that itself when terminated, but not when
    killed."""
    process.terminate()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def reason(complaint: str) -> str:
    """The first exception named in a process's complaint, short enough for a table."""
    found = re.search(
        r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", complaint, re.MULTILINE
    )
    return (found.group(1) if found else "failed without naming an exception")[:100].replace(
        "|", "/"
    )


def judge(ranks: list[dict], world_size: int) -> Outcome:
    """Worst error of the whole windows, error of the last, and whether each row reached the update
    it belongs to."""
    windows = make_windows(world_size)
    updates = {len(rank["errors"]) for rank in ranks}
    if len(ranks) != world_size or len(updates) != 1:
        return Outcome(
            "failed",
            [f"{len(ranks)} of {world_size} processes reported, updates {sorted(updates)}"],
        )
    done = updates.pop()
    errors = [
        max((rank["errors"][t] for rank in ranks), key=nan_is_worst)
        for t in range(min(done, len(windows)))
    ]
    whole = max(errors[:WHOLE], key=nan_is_worst, default=None)
    tail = errors[WHOLE] if done > WHOLE else None

    notes = []
    if done != len(windows):
        notes.append(f"{done} updates of {len(windows)}")
    seen = [[row for rank in ranks for row in rank["seen"][t]] for t in range(done)]
    times = Counter(row for rows in seen for row in rows)
    repeated, missing = sum(n - 1 for n in times.values()), sum(map(len, windows)) - len(times)
    if repeated:
        notes.append(f"repeats {repeated} rows")
    if missing:
        notes.append(f"{missing} rows never trained")
    starts = [sum(map(len, windows[:t])) for t in range(len(windows))]
    given = [range(start, start + len(rows)) for start, rows in zip(starts, windows, strict=True)]
    if any(sorted(rows) != list(mine) for rows, mine in zip(seen[:WHOLE], given, strict=False)):
        notes.append("whole windows hold other rows")
    return Outcome(f"{figure(whole)} / {figure(tail)}", notes)


def nan_is_worst(error: float) -> float:
    return math.inf if math.isnan(error) else error


def figure(error: float | None) -> str:
    """`2e-7` up to a thousandth, `5.2 %` above; `none` where no update was made."""
    if error is None:
        return "none"
    if error <= 1e-3:
        mantissa, exponent = f"{error:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{100 * error:.2g} %" if error < 0.1 else f"{100 * error:.0f} %"


def row(peer: str) -> str:
    """A peer's line of the table; notes that hold for both architectures are said once."""
    label, _, packages = PEERS[peer]
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        return f"| {label} |{' – |' * len(CELLS)} {', '.join(absent)} not installed |"
    outcomes = {}
    for kind, world_size in CELLS:
        outcome = outcomes[kind, world_size] = run(peer, kind, world_size)
        print(
            peer, kind, f"W={world_size}", outcome.cell, *outcome.notes, file=sys.stderr, sep="  "
        )
    return (
        f"| {label} | {' | '.join(outcome.cell for outcome in outcomes.values())} | "
        f"{remarks(outcomes)} |"
    )


def remarks(outcomes: dict[tuple[str, int], Outcome]) -> str:
    """The notes of all cells, each said once with the cells that it holds for."""
    cells_of: dict[str, list[tuple[str, int]]] = {}
    for cell, outcome in outcomes.items():
        for note in outcome.notes:
            cells_of.setdefault(note, []).append(cell)
    said = []
    for note, cells in cells_of.items():
        worlds = sorted({world_size for _, world_size in cells})
        if len(cells) == len(outcomes):
            said.append(note)
        elif len(cells) == len(worlds) * len(KINDS):
            said.append(f"W={worlds[0]}: {note}")
        else:
            said.append(
                f"{', '.join(f'{KINDS[kind]} W={world_size}' for kind, world_size in cells)}: "
                f"{note}"
            )
    return "; ".join(said) or "every row once"


def float32_floor() -> float:
    """What float32 itself costs: the worst error of one float32 big batch over all windows, at the
    first weights."""
    worst = 0.0
    for kind in KINDS:
        single, exact = make_model(kind), make_model(kind).double()
        for rows in (rows for world_size in WORLD_SIZES for rows in make_windows(world_size)):
            worst = max(worst, relative_error(big_batch(single, rows), big_batch(exact, rows)))
    return worst


def versions() -> str:
    def named(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} not installed"

    return ", ".join(map(named, ("torch", "accelerate", "transformers", "trl", "lightning")))


def heading() -> str:
    counts = [sum(map(len, make_windows(world_size))) for world_size in WORLD_SIZES]
    rows = [row for window in make_windows(WORLD_SIZES[-1]) for row in window]
    bare = sum(row["labels"][0] != IGNORE for row in rows) / len(rows)
    return (
        f"Relative error of an update against one float64 big batch: worst of {WHOLE} whole "
        f"windows / the uneven last one. {versions()}; CPU, {platform.machine()}. B={B}, K={K}; "
        f"{counts[0]} rows at W=1, {counts[1]} at W=2 (DDP, gloo), 2 to 40 tokens, prompts masked "
        f"({bare:.0%} have none); SGD, no clipping. One float32 big batch is itself up to "
        f"{figure(float32_floor())} off."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="rows of the table"
    )
    parser.add_argument("--out", help="also write the table to this file")
    options = parser.parse_args()
    columns = [f"{KINDS[kind]} W={world_size} whole / tail" for kind, world_size in CELLS]
    lines = [
        heading(),
        "",
        f"| loop | {' | '.join(columns)} | note |",
        f"|---|{'---|' * len(columns)}---|",
        *map(row, options.peers),
    ]
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
