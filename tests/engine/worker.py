"""Run cases on one engine and write what they return: one JSON per rank.

python -m tests.engine.worker OUT ENGINE-OPTIONS-AS-JSON [CASE ...]
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch


def main(out: str, engine: str, *names: str) -> None:
    from tests.engine import cases
    from tests.engine.cases.probing import forget_accelerate, rank

    cases.ENGINE.update(json.loads(engine))
    if not cases.ENGINE.get("cpu", True) and cases.ENGINE.get("backend") == "gloo":
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = (
            "true"  # all on one GPU: DDP must not want one per local rank
        )
    # A case that fails on one rank must fail the launch, not hang it.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group(
            cases.ENGINE.get("backend", "gloo"), timeout=timedelta(seconds=300)
        )
    if set(cases.ENGINE) & {"zero_stage", "fsdp"}:
        names = names or tuple(set(cases.CASES) - cases.OF_ACCELERATE)
    chosen = {name: run for name, run in cases.CASES.items() if name in names or not names}
    results = {}
    for name, run in chosen.items():
        if "ACCELERATE_USE_DEEPSPEED" in os.environ:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]  # accelerate sets it for good
        forget_accelerate(whole=True)
        torch.manual_seed(0)
        if rank() == 0:
            print(
                f"case {name}", file=sys.stderr, flush=True
            )  # a case that hangs is the last one named
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
    main(*sys.argv[1:])
