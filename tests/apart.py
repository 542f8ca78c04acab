"""Two real processes that differ in one thing each time, one case after the other: what does each
of them end with?

torchrun -m tests.apart FOLDER [CASE ...]

Writes FOLDER/rankN.json: case -> {"status", "err"} and what the case adds. A case that ends a
process for good is no case of this file: here all processes must come out of each case together.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from accum_trainer.cli import main as command_line
from accum_trainer.engine.own_parts import NamedTensors
from accum_trainer.sources import dataset as windows
from accum_trainer.train import checkpoint, checkpoint_folder, checkpoint_writer, model
from accum_trainer.train import rows as train_rows
from accum_trainer.train.records import read_records

CASES: dict[str, Callable[[], dict[str, Any]]] = {}
BASE = Path(sys.argv[1]) if __name__ == "__main__" else Path()


def case(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


def rank() -> int:
    return torch.distributed.get_rank()


def own(name: str) -> Path:
    """A folder of this rank: on another machine, `name` would be its local disk."""
    folder = BASE / f"machine-{rank()}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rows(name: str = "rows.jsonl", num_rows: int = 24) -> Path:
    path = BASE / f"{rank()}-{name}"
    path.write_text(
        "".join(
            json.dumps({"text": f"{n} and {n + 1} " * (n % 5 + 1)}) + "\n" for n in range(num_rows)
        )
    )
    return path


def run(*argv: object, **options: object) -> dict[str, Any]:
    """`accum-trainer train` here, in this process among the others: its status and what it wrote to
    stderr."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = {
        "dataset_file": rows(),
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr": 0.01,
    } | options
    named = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    err, status = io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            command_line(["train", "--cpu", *named, *map(str, argv)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        except Exception as error:
            status, _ = 1, err.write(f"{type(error).__name__}: {error}")
    return {"status": status, "err": err.getvalue()}


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any], on: int):
    """Replace `owner.name` on one rank: a fault of that machine."""
    before = getattr(owner, name)
    if rank() == on:
        setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@case
def run_folders_of_their_own() -> dict[str, Any]:
    os.chdir(own("fresh"))
    found = run(output_dir="run", steps=1)
    return found | {"left": sorted(os.listdir("."))}


@case
def run_folders_of_other_names() -> dict[str, Any]:
    return run(output_dir=own("named"), steps=1)


@case
def first_half() -> dict[str, Any]:
    """Not a fault: what the next cases continue."""
    return run(output_dir=BASE / "run", steps=2, checkpoint_every=1, scheduler="constant")


@case
def stale_listing() -> dict[str, Any]:
    """Rank 1 is not shown the newest checkpoint yet."""
    with replaced(
        checkpoint_folder,
        "list_checkpoints",
        lambda before: lambda folder: before(folder)[:1],
        on=1,
    ):
        found = run(output_dir=BASE / "run", steps=4, checkpoint_every=1, scheduler="constant")
    return found | {
        "steps": [record["step"] for record in read_records(BASE / "run" / "metrics.jsonl")]
    }


@case
def checkpoints_of_their_own() -> dict[str, Any]:
    """Under one name each machine keeps another checkpoint of the run."""
    os.chdir(own("resumed"))
    steps = sorted((BASE / "run" / "checkpoints").iterdir())
    shutil.copytree(steps[-1 - rank()], "saved")
    return run(output_dir=BASE / "third", steps=5, resume="saved")


@case
def other_state_after_loading() -> dict[str, Any]:
    """Rank 1 loads the same files and comes to other weights."""

    class Spoilt(NamedTensors):
        def __getitem__(self, name: str) -> torch.Tensor:
            tensor = super().__getitem__(name)
            tensor.view(-1)[0] += name == next(iter(self))
            return tensor

    def spoilt(before: Any) -> Any:
        def load(*arguments: Any) -> Any:
            found = before(*arguments)
            found.model.__class__ = Spoilt
            return found

        return load

    with replaced(checkpoint, "load_checkpoint", spoilt, on=1):
        return run(output_dir=BASE / "run", steps=6)


@case
def other_windows() -> dict[str, Any]:
    """Rank 1 goes through the samples in another order."""

    def shuffled(before: Any) -> Any:
        return lambda size, seed, epoch: before(size, seed + 1, epoch)

    with replaced(windows, "global_order", shuffled, on=1):
        return run(output_dir=BASE / "windows", steps=3)


def raising(error: Exception, call: int = 1) -> Callable[[Any], Any]:
    """Of a function, one that raises at its `call`-th call."""
    calls: list[int] = []

    def make(before: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise error
            return before(*args, **kwargs)

        return function

    return make


@case
def data_file_missing_on_one() -> dict[str, Any]:
    return run(
        output_dir=BASE / "missing",
        steps=1,
        dataset_file=BASE / "0-rows.jsonl" if rank() == 0 else "/no/rows.jsonl",
    )


@case
def tokenising_fails_on_one() -> dict[str, Any]:
    with replaced(train_rows, "tokenize", raising(OSError("the cache is read-only")), on=1):
        return run(output_dir=BASE / "tokenising", steps=1)


@case
def loading_fails_on_one() -> dict[str, Any]:
    with replaced(model, "load_model", raising(MemoryError("no memory for the model")), on=1):
        return run(output_dir=BASE / "loading", steps=1)


@case
def disk_full_while_saving() -> dict[str, Any]:
    full = raising(OSError(28, "No space left on device"))
    with replaced(checkpoint_writer, "write_part", full, on=1):
        return run(output_dir=BASE / "full", steps=2, checkpoint_every=1)


def main(*names: str) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = {}
    for name, function in CASES.items():
        if not names or name in names:
            print(
                f"case {name}", file=sys.stderr, flush=True
            )  # one that hangs is the last one named
            results[name] = function()
            os.chdir(BASE)
    (BASE / f"rank{rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[2:])
