"""Run all cases on this process's engine and write what they return: one JSON per rank."""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch


def main(out: str) -> None:
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from tests.engine.cases import CASES, rank

    # A case that fails on one rank must fail the launch, not hang it.
    PartialState(cpu=True, timeout=timedelta(seconds=60))
    results = {}
    for name, run in CASES.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        torch.manual_seed(0)
        try:
            results[name] = run()
        except Exception:
            results[name] = {"traceback": traceback.format_exc()}
            print(f"{name} on rank {rank()}:\n{traceback.format_exc()}", file=sys.stderr)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"rank{rank()}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
