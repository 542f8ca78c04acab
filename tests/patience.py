"""Slow work of one process, under a process group that gives up early: torchrun -m tests.patience
FOLDER MACHINES."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

FOLDER, MACHINES = Path(sys.argv[1]), int(sys.argv[2])
RANK = int(os.environ["RANK"])
GIVES_UP, SLOW = 6.0, 8.0  # seconds


def note(name: str, wait_for: str | None) -> list[str]:
    """Leave a file; return what there was before, or once `wait_for` is there."""
    found = sorted(path.name for path in FOLDER.glob("turn-*"))
    (FOLDER / name).touch()
    deadline = time.monotonic() + 60
    while wait_for is not None and not (FOLDER / wait_for).exists():
        assert time.monotonic() < deadline, f"{wait_for} does not come: the processes take turns"
        time.sleep(0.02)
    return found


def main() -> None:
    if MACHINES == 2:
        os.environ["LOCAL_RANK"] = "0"  # each is the first of its machine
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=GIVES_UP))
    from accum_trainer import Accumulator

    engine = Accumulator(micro_batch_size=1, cpu=True).engine
    other = f"turn-{1 - RANK}" if MACHINES == 2 else None
    found = engine.main_first(note, f"turn-{RANK}", other)
    if MACHINES == 1:
        assert found == ["turn-0"] * RANK, found  # the second finds what the first left
        engine.on_main(time.sleep, SLOW)
        engine.barrier()
        assert engine.gather_objects(RANK) == [0, 1]
    (FOLDER / f"done-{RANK}").touch()


if __name__ == "__main__":
    main()
