"""Host memory of a machine while FSDP2 or ZeRO-3 loads a model: process 0 alone reads it and deals
the shards, against every process reading it.

    python benchmarks/loading.py [--processes 2 4] [--size 0.3B]

A Llama is written to a folder in bf16, as most are, and loaded in float32 as `train` does, up to
sharded weights, on the CPU. Memory is what the processes hold that no file backs, all together,
sampled every 5 ms, less what they held before. The shards together are one whole model. Under
ZeRO-3 transformers shards the model while it is read; before DeepSpeed takes it, as its master copy
of the weights would be on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.models import SIZES, llama
from benchmarks.host_memory import linger, most_held, wait_to_begin


def load(folder: str, engine: str, deals: bool) -> None:
    """One of the processes: load, when told to."""
    from accum_trainer import Accumulator, TrainConfig
    from accum_trainer.lm.model import load_tokenizer
    from accum_trainer.train.model import load_same

    named = {"fsdp": True} if engine == "fsdp2" else {"zero_stage": 3}
    acc = Accumulator(micro_batch_size=1, gradient_accumulation_steps=1, cpu=True, **named)
    if engine == "fsdp2":
        acc.engine.deals_weights = deals
    elif not deals:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    config = TrainConfig(model=folder, cpu=True)
    tokenizer = load_tokenizer(TrainConfig())
    wait_to_begin(Path(folder), acc.engine)
    model = load_same(config, acc.engine, tokenizer)
    if engine == "fsdp2":
        model = acc.prepare(model)
        assert sum(p.to_local().numel() for p in model.parameters()) > 0
    else:
        assert deals == all(hasattr(p, "ds_id") for p in model.parameters())
    linger(acc.engine)


def measure(folder: Path, processes: int, engine: str, deals: bool) -> int:
    """The most that was held while it was loaded."""
    ways = ["--deals"] if deals else []
    arguments = ("--folder", folder, "--engine", engine, *ways)
    return most_held(folder, processes, "benchmarks.loading", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--deals", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        load(options.folder, options.engine, options.deals)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = llama(options.size)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        model.bfloat16().save_pretrained(folder)
        del model
        print(f"A Llama of {size / 4e6:.0f}M parameters, {size / 1e9:.2f} GB in float32, CPU")
        print("\n| engine | processes | every process reads, x model | process 0 reads, x model |")
        print("|---|---|---|---|")
        for engine in ("fsdp2", "zero3"):
            for processes in options.processes:
                most = [measure(folder, processes, engine, deals) for deals in (False, True)]
                figures = " | ".join(f"{one / size:.2f}" for one in most)
                print(f"| {engine} | {processes} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
