"""Start real processes as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more: object) -> dict[str, str]:
    """This process's environment without what a launcher or a user's shell may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "ACCUM_TRAINER_")) or name == "ACCUM_TRAINER_CACHE"
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return kept | {name: str(value) for name, value in more.items()}


def run(
    command: list[object], timeout: float = 600, **more: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *arguments], **more)


def cli(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    """The command `accum-trainer`."""
    return python("-m", "accum_trainer", *arguments, **more)


def torchrun(
    processes: int, module: str, *arguments: object, **more: object
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m module` on one machine, on a port of its own."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "-m",
        module,
    ]
    return python(*launcher, *arguments, **more)
