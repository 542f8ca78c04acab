"""Break real runs in random ways, continue them, and compare them with an undisturbed run.

    python benchmarks/chaos.py --trials 300 [--seed 0] [--kinds single ddp zero2 fsdp2]

A trial starts `accum-trainer train` on one process or two, does one thing to it at a random moment,
then gives the same command again until the run is done. Its weights must be those of the
undisturbed run to the bit and its records each update once. `chaos_faults.py` has the faults. One
that this machine does not allow is named and left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from accum_trainer.engine.zero_build import LONGEST_BUILD
from accum_trainer.train.checkpoint_folder import newest_whole
from accum_trainer.train.records import read_records
from benchmarks.chaos_faults import FAULTS, KINDS, Job, unavailable
from tests.launching import script

ADAPTER = "adapter_model.safetensors"
MOST_STARTS = 6  # until a run must be done
TIMED = (
    *("tokens_per_sec", "samples_per_sec", "step_time_sec", "data_wait_sec"),
    *("memory_gb", "peak_gb"),
)


@dataclass
class Trial:
    """What became of one run.

    Attributes:
        wrong: what must not be; empty if all was right.
        hit: the fault reached the run before its end.
        starts: how often the command was given.
        refused: it was refused with the remedy, which was then taken.
        records_changed: it said that metrics.jsonl is not what was written.
        lost: updates that were made again though a whole checkpoint had them.
    """

    fault: str
    kind: str
    wrong: list[str] = field(default_factory=list)
    hit: bool = False
    starts: int = 0
    refused: bool = False
    records_changed: bool = False
    lost: int = 0


def trial(fault: str, kind: str, reference: Path, seed: int) -> Trial:
    """Break one run, continue it until it is done, and compare it."""
    found, rng = Trial(fault, kind), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        folder = Path(place).resolve()
        inject = FAULTS[fault].inject
        job = Job(kind, folder, inject=inject)
        found.hit = FAULTS[fault].act(job, rng)
        while _look_at(job, found) and found.starts < MOST_STARTS:
            before = _newest_step(job.run)
            more = ("--resume", "anew") if "resume=anew" in job.err else ()
            found.refused = found.refused or bool(more)
            job = Job(kind, folder, *more, inject=inject)
            job.wait()
            first = [line for line in job.err.splitlines() if "continued from" in line]
            if first and not more:
                after = int(first[0].split(" after ")[1].split()[0])
                found.lost += max(0, before - after)
        if not _is_done(job.run):
            found.wrong.append(f"not done after {found.starts} starts: {job.err[-600:]}")
        else:
            found.wrong += _differences(job.run, reference, found.records_changed)
    return found


def _look_at(job: Job, found: Trial) -> bool:
    """Judge how a start ended; whether another one is needed."""
    found.starts += 1
    found.records_changed = found.records_changed or "some line was changed" in job.err
    if job.hung:
        found.wrong.append(f"hung: {job.err[-600:]}")
    # A process whose peer was killed may end in any way; one that was not disturbed may not.
    if found.starts > 1 and "Traceback" in job.err:
        found.wrong.append(f"traceback in start {found.starts}: {job.err[-1500:]}")
    return not _is_done(job.run)


def _is_done(run: Path) -> bool:
    try:
        return bool(json.loads((run / "result.json").read_text())["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _newest_step(run: Path) -> int:
    newest = newest_whole(run / "checkpoints")
    return int(newest.name.removeprefix("step-")) if newest else 0


def _differences(run: Path, reference: Path, records_changed: bool) -> Iterator[str]:
    """Weights that are not those of the reference to the bit; records that are not its, unless the
    run has said so."""
    ours, theirs = (_weights(path / "model" / ADAPTER) for path in (run, reference))
    if ours.keys() != theirs.keys():
        yield f"weights have other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
        return
    differing = [name for name in ours if not (ours[name] == theirs[name]).all()]
    if differing:
        yield f"{len(differing)} of {len(ours)} weights differ, such as {differing[0]}"
    mine, its = (
        [
            {k: v for k, v in record.items() if k not in TIMED}
            for record in read_records(path / "metrics.jsonl")
        ]
        for path in (run, reference)
    )
    if mine != its:
        steps = [record["step"] for record in mine]
        # A line of metrics.jsonl that was destroyed is lost, which is said; none may come twice.
        changed = any(record not in its for record in mine) and not records_changed
        if changed or len(set(steps)) < len(steps):
            yield f"records differ: updates {steps}"


def _weights(path: Path) -> dict[str, Any]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def reference(kind: str, fault: str, folder: Path) -> Path:
    """An undisturbed run of `kind`, with what the fault has in it; made once in `folder`.

    Raises:
        SystemExit: it failed, or an injected fault did not come.
    """
    inject = FAULTS[fault].inject
    place = folder / (f"{kind}-{fault}" if inject else kind)
    if not place.exists():
        place.mkdir()
        # The first start of ZeRO on a machine, or since DeepSpeed was updated, compiles.
        job = Job(kind, place.resolve(), inject=inject, limit=LONGEST_BUILD)
        job.wait()
        if job.hung:
            raise SystemExit(f"the undisturbed run of {kind} did not end in {LONGEST_BUILD:.0f} s")
        if job.status != 0:
            raise SystemExit(f"the undisturbed run of {kind} failed: {job.err[-2000:]}")
        skipped = [
            one["step"] for one in read_records(place / "run/metrics.jsonl") if one["skipped"]
        ]
        if bool(skipped) != bool(inject):
            raise SystemExit(f"the undisturbed run of {kind} skipped the windows {skipped}")
    return place / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    # From this thread: the process that all others are forked from ends with its first thread.
    script("pass", Path.cwd())
    trials: list[Trial] = []
    kinds = {
        name: [k for k in options.kinds if KINDS[k][0] > 1 or not FAULTS[name].takes_several]
        for name in options.faults
    }
    left_out = {n: "no kind has several processes" for n, those in kinds.items() if not those}
    left_out |= unavailable()
    for name in kinds.keys() & left_out.keys():
        print(f"left out: {name}: {left_out[name]}", flush=True)
    faults = [name for name in options.faults if name not in left_out]
    if not faults:
        raise SystemExit("no fault is left")
    with tempfile.TemporaryDirectory(prefix="chaos-reference-") as place:
        for number in range(options.trials):
            fault = faults[number % len(faults)]
            kind = rng.choice(kinds[fault])
            known = reference(kind, fault, Path(place))
            one = trial(fault, kind, known, rng.randrange(2**31))
            trials.append(one)
            words = "; ".join(one.wrong) or "whole"
            met = "hit" if one.hit else "missed"
            print(f"{number + 1}: {fault}, {kind}, {met}, {one.starts} starts: {words}", flush=True)
    print("\n".join(table(trials)))
    return int(any(one.wrong for one in trials))


def table(trials: list[Trial]) -> list[str]:
    """Markdown: per fault, what was seen."""
    lines = [
        "| fault | trials | starts | refused with the remedy | updates lost beyond the last "
        "checkpoint | wrong |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, fault in FAULTS.items():
        those = [one for one in trials if one.fault == name]
        if those:
            lines.append(
                f"| {fault.says} | {len(those)} | {sum(t.starts for t in those)} | "
                f"{sum(t.refused for t in those)} | {sum(t.lost for t in those)} | "
                f"{sum(bool(t.wrong) for t in those)} |"
            )
    kinds = Counter(one.kind for one in trials)
    missed = sum(not one.hit for one in trials)
    lines += ["", "Runs: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + "."]
    lines += [f"In {missed} of them the run had ended before the fault."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
