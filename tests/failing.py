"""A training of which process 1 fails in one place: torchrun -m tests.failing PLACE
TRAIN-ARGUMENTS."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from accum_trainer.cli import main
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.sources.collating import PackingCollator
from accum_trainer.train import loop as train

PLACES: dict[str, tuple[Any, str]] = {
    "__getitem__": (TokenizedRows, "__getitem__"),
    "collate": (PackingCollator, "__call__"),
    "forward": (train, "causal_lm_loss"),
}


def failing(before: Any, place: str) -> Any:
    calls: list[int] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        # The proof before training collates too, and takes an error for an answer.
        if place != "collate" or threading.current_thread().name == "windows":
            calls.append(1)
        if len(calls) == 6:
            raise FloatingPointError(f"{place} of process 1")
        return before(*args, **kwargs)

    return function


if __name__ == "__main__":
    owner, name = PLACES[sys.argv[1]]
    if os.environ["RANK"] == "1":
        setattr(owner, name, failing(getattr(owner, name), sys.argv[1]))
    main(["train", "--cpu", *sys.argv[2:]])
