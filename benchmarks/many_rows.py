"""Memory and time that `train` takes to read and tokenise a large data file.

    python benchmarks/many_rows.py [--rows 2000 100000 1000000] [--numbers]

For each number a .jsonl file of short rows is written (`--numbers`: whose completions are numbers
in JSON, which are read as text), and a new process trains three updates on it
with an empty cache. A thread of that process reads its private memory: what it has resident beside
files and shared libraries, since the tokenised rows are a file that the kernel may drop. Its peaks
are until the end of the first update, and afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.launching import python

OPTIONS = (
    *("--cpu", "--batch-size", "4", "--gradient-accumulation-steps", "2", "--steps", "3"),
    *("--max-seq-len", "64", "--output-dir", "run", "--dataset-file", "rows.jsonl"),
)


class Peak:
    """Private memory of this process, looked at all the time."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
            self.most = max(self.most, (int(resident) - int(shared)) * page)
            time.sleep(0.01)

    def take(self) -> float:
        """The highest so far, in MB; it begins anew."""
        time.sleep(0.05)
        most, self.most = self.most, 0
        return most / 1e6


def worker() -> None:
    """Train on rows.jsonl; write what was measured to memory.json."""
    from accum_trainer.cli.train import parse
    from accum_trainer.train import updates

    peak, began, found = Peak(), time.monotonic(), {}
    for _ in updates(parse(OPTIONS).config):
        if not found:
            found = {"reading_mb": peak.take(), "seconds": time.monotonic() - began}
    Path("memory.json").write_text(json.dumps(found | {"training_mb": peak.take()}))


def measure(rows: int, folder: Path, numbers: bool = False) -> dict[str, float]:
    """{reading_mb, seconds, training_mb}: private memory until the end of the first update, the
    time until then, private memory afterwards.

    Raises:
        RuntimeError: the run failed.
    """
    folder.mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for n in range(rows):
            total = n + n % 97
            row = {"prompt": f"{n} + {n % 97} = ", "completion": total if numbers else str(total)}
            file.write(json.dumps(row) + "\n")
    ended = python(
        *("-m", "benchmarks.many_rows", "--worker"),
        cwd=folder,
        timeout=3600,
        ACCUM_TRAINER_CACHE=folder / "cache",
    )
    if ended.returncode != 0:
        raise RuntimeError(f"the run on {rows} rows failed: {ended.stderr[-3000:]}")
    return dict(json.loads((folder / "memory.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 100_000, 1_000_000])
    parser.add_argument("--numbers", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    print("| rows | seconds until the first update | private MB until then | afterwards |")
    print("| --- | --- | --- | --- |")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="many-rows-") as place:
            found = measure(rows, Path(place, "run-of-rows").resolve(), options.numbers)
        print(
            f"| {rows:,} | {found['seconds']:.0f} | {found['reading_mb']:.0f} | "
            f"{found['training_mb']:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
