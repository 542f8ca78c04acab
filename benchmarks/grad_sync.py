"""What `grad_sync` trades: reductions and bytes against memory, for ZeRO-2, ZeRO-3 and FSDP2 on two
processes.

    python benchmarks/grad_sync.py [--k 8] [--out FILE.md]

Each row is one launch of its own: an update of K micro-batches of a 19M-parameter Llama, repeated;
the numbers that the reductions hand in are counted, peak resident memory is that of the larger
process above what it held before training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from accum_trainer import Accumulator, causal_lm_loss
from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak

ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "FSDP2": {"fsdp": True},
}
POLICIES = ("once-per-window", "every-microbatch")
# Resident memory then follows what torch holds.
RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
}


def make_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Note the numbers that each reduction hands in; DeepSpeed keeps a function of its own for
    ZeRO-3."""
    import torch.distributed as dist

    places: list[tuple[Any, str, int]] = [
        (dist, "all_reduce", 0),
        (dist, "reduce", 0),
        (dist, "reduce_scatter_tensor", 1),
    ]
    places += [(dist, "reduce_scatter_single", 1)] if hasattr(dist, "reduce_scatter_single") else []
    with contextlib.suppress(ImportError):
        import deepspeed.comm

        places.append((deepspeed.comm, "reduce_scatter_fn", 1))
    counted: list[int] = []
    kept = [getattr(module, name) for module, name, _ in places]

    def spy(function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = (
                args[position]
                if len(args) > position
                else kwargs.get("tensor", kwargs.get("input"))
            )
            counted.append(given.numel())
            return function(*args, **kwargs)

        return call

    for (module, name, position), function in zip(places, kept, strict=True):
        setattr(module, name, spy(function, position))
    try:
        yield counted
    finally:
        for (module, name, _), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def measure(engine: str, policy: str, k: int) -> dict[str, float]:
    """One process's part: three updates; reductions of the last as multiples of the gradient, and
    peak memory."""
    acc = Accumulator(
        micro_batch_size=2,
        gradient_accumulation_steps=k,
        grad_sync=policy,
        cpu=True,
        **ENGINES[engine],
    )
    model = make_model()
    trained = sum(p.numel() for p in model.parameters())
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    ids = torch.randint(
        0, 512, (6 * k * acc.plan.world_size, 64), generator=torch.Generator().manual_seed(0)
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = memory_gb(acc.device)
    reset_peak(acc.device)
    exchanged = 0.0
    for window in acc.windows(rows):
        with counting() as counted:
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(causal_lm_loss(model, batch))
        exchanged = sum(counted) / trained
        acc.step(optimizer)
    return {
        "reductions": exchanged,
        "gb": max(acc.engine.all_gather_floats([peak_gb(acc.device) - before])[:, 0]),
        "trained": trained,
    }


def launch(engine: str, policy: str, k: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
    ]
    command += ["--measure", engine, policy, "--k", str(k)]
    finished = subprocess.run(
        command, env=os.environ | RETURN_FREED_MEMORY, capture_output=True, text=True
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode or not lines:
        sys.exit(finished.stderr[-3000:])
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        result = measure(*options.measure, options.k)
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)
        return
    rows = {(e, p): launch(e, p, options.k) for e in ENGINES for p in POLICIES}
    size = rows["ZeRO-2", POLICIES[0]]["trained"] * 4 / 1e9
    lines = [
        f"grad_sync at K = {options.k}: Llama of "
        f"{rows['ZeRO-2', POLICIES[0]]['trained'] / 1e6:.0f}M parameters (a float32 gradient is "
        f"{size:.3f} GB), 2 processes over gloo, CPU, torch {torch.__version__}, "
        f"{platform.machine()}",
        "",
        "| engine | policy | reductions of the gradient per window | peak memory of training, GB "
        "per process |",
        "|---|---|---|---|",
        *(
            f"| {e} | {p} | {found['reductions']:.2f} | {found['gb']:.3f} |"
            for (e, p), found in rows.items()
        ),
    ]
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
