"""Estimated memory and traffic of each engine against real processes: what `accum-trainer plan`
says, and what happens.

    python benchmarks/footprint.py [--cases zero3 fsdp2]

A 9M-parameter Llama is trained for a few updates on the CPU, on one process or two over gloo.
Measured is what torch's allocator hands out and gets back (the profiler's memory events), the
figure that `torch.cuda.max_memory_allocated` is on a GPU: memory that is held but never touched
counts, what the C library and gloo copy for themselves does not. Traffic is the collectives' sizes
as torch records them, as bytes that a ring sends: 2 (W-1)/W of an all-reduced buffer, (W-1)/W of
one gathered or scattered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

BATCH, TOKENS, K = 4, 128, 2
# DeepSpeed's buffers are made for models of billions; here they are in the proportion to the model
# that they have there.
LIMITS = {"reduce_bucket": 1_000_000, "prefetch": 500_000, "live": 4_000_000}


@dataclass(frozen=True)
class Case:
    """One run: how many processes, under which engine and policy, with which options of `train`."""

    engine: str
    grad_sync: str = "once-per-window"
    k: int = K
    options: dict[str, Any] = field(default_factory=dict)
    weight_sync: str = "every-microbatch"

    @property
    def processes(self) -> int:
        return 1 if self.engine == "single" else 2


ONCE, EVERY = "once-per-window", "every-microbatch"
BF16, LORA, CHECKPOINTED = (
    {"mixed_precision": "bf16"},
    {"use_peft": True},
    {"gradient_checkpointing": True},
)
CASES = {
    "single": Case("single"),
    "single, K=1": Case("single", k=1),
    "single, bf16": Case("single", options=BF16),
    "single, LoRA": Case("single", options=LORA),
    "single, checkpointed": Case("single", options=CHECKPOINTED),
    "single, bf16, checkpointed": Case("single", options=BF16 | CHECKPOINTED),
    "ddp": Case("ddp"),
    "ddp, bf16": Case("ddp", EVERY, options=BF16),
    "zero1": Case("zero1"),
    "zero1, bf16": Case("zero1", options=BF16),
    "zero2": Case("zero2"),
    "zero2, every": Case("zero2", EVERY),
    "zero2, bf16": Case("zero2", options=BF16),
    "zero2, bf16, every": Case("zero2", EVERY, options=BF16),
    "fsdp2": Case("fsdp2"),
    "fsdp2, every": Case("fsdp2", EVERY),
    "fsdp2, K=1": Case("fsdp2", k=1),
    "fsdp2, bf16": Case("fsdp2", options=BF16),
    "fsdp2, checkpointed": Case("fsdp2", EVERY, options=CHECKPOINTED),
    "fsdp2, whole": Case("fsdp2", weight_sync=ONCE),
    "fsdp2, whole, K=1": Case("fsdp2", k=1, weight_sync=ONCE),
    "fsdp2, whole, bf16, every": Case("fsdp2", EVERY, options=BF16, weight_sync=ONCE),
    "fsdp2, whole, LoRA": Case("fsdp2", options=LORA, weight_sync=ONCE),
    # Last: DeepSpeed puts a linear function of its own in torch's place.
    "zero3": Case("zero3"),
    "zero3, every": Case("zero3", EVERY),
    "zero3, bf16": Case("zero3", options=BF16),
    "zero3, LoRA": Case("zero3", options=LORA),
    "zero3, whole": Case("zero3", weight_sync=ONCE),
    "zero3, whole, bf16": Case("zero3", options=BF16, weight_sync=ONCE),
}


def case_named(name: str) -> Case:
    """One of `CASES`; or its first word at another K, as in `zero2, K=16`."""
    if name in CASES:
        return CASES[name]
    engine, k = name.split(", K=")
    return replace(CASES[engine], k=int(k))


@dataclass(frozen=True)
class Measured:
    """What one process did in one update, in bytes."""

    peak: float
    sent: float


def make_files(folder: Path) -> None:
    """A model with the embedded tokenizer, saved as a user's would be, rows to train on, and
    DeepSpeed's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from accum_trainer.data.embedded import corpus_tokenizer

    tokenizer = corpus_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "one row"}) + "\n")
    for stage in (1, 2, 3):
        zero = {"stage": stage, "reduce_bucket_size": LIMITS["reduce_bucket"]}
        if stage == 3:
            zero["stage3_prefetch_bucket_size"] = LIMITS["prefetch"]
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIMITS["live"]
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))


def train_config(folder: Path, case: Case) -> Any:
    from accum_trainer import TrainConfig

    return TrainConfig(
        model=str(folder / "model"),
        dataset_file=str(folder / "rows.jsonl"),
        max_seq_len=TOKENS,
        batch_size=BATCH,
        gradient_accumulation_steps=case.k,
        grad_sync=case.grad_sync,
        weight_sync=case.weight_sync,
        zero_stage=case.engine if case.engine.startswith("zero") else "none",
        cpu=True,
        **case.options,
    )


def estimate(folder: Path, case: Case) -> Any:
    """The `Footprint` that `plan` finds for this case."""
    from accum_trainer import BatchPlan
    from accum_trainer.plan.footprint import footprints
    from accum_trainer.plan.job import DeepSpeedSizes

    config = train_config(folder, case)
    found = footprints(
        config, BatchPlan(BATCH, case.k, case.processes), DeepSpeedSizes(**LIMITS)
    ).rows
    return next(f for f in found if f.engine == case.engine)


def batches(count: int, seed: int, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of B rows as long as they get, but for one token of padding: what makes the
    attention take a mask."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (BATCH, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def measure(folder: Path, case: Case) -> Measured:
    """Train here and measure the last update, when every engine has settled (ZeRO-3 watches two
    micro-batches first)."""
    from accum_trainer.engine.fsdp import FSDPEngine
    from accum_trainer.losses.causal_lm import causal_lm_loss
    from accum_trainer.train import model as train_model
    from accum_trainer.train.setup import assemble

    updates = 3 if case.k > 1 else 4
    settings = {"ACCELERATE_USE_FSDP": "true"} if case.engine == "fsdp2" else {}
    if case.engine.startswith("zero"):
        settings["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / f"{case.engine}.json")
    recorded = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    )
    load = train_model.load_model

    def load_and_record(*args: Any) -> torch.nn.Module:
        """Weights are read on threads of their own, unseen: their memory is taken once more, in
        sight."""
        model = load(*args)
        recorded.start()
        for p in model.parameters():
            own = getattr(p, "ds_tensor", p)  # under ZeRO-3, this process's shard
            own.data = own.data.clone()
        return model

    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(train_model, "load_model", load_and_record),
        # Every process loads, in sight: torch's profiler does not survive the dealing of shards.
        mock.patch.object(FSDPEngine, "deals_weights", False),
    ):
        parts = assemble(train_config(folder, case))
        acc = parts.accumulator
        assert acc.engine.name == case.engine, acc.engine.name
        source = batches(updates * case.k, acc.engine.rank, len(parts.tokenizer))
        for number, window in enumerate(acc.windows(source)):
            with torch.profiler.record_function(f"update {number}"):
                for batch in window:
                    with acc.accumulate(parts.model):
                        acc.backward(causal_lm_loss(parts.model, batch))
                acc.step(parts.optimizer, parts.scheduler)
        recorded.stop()
    return read(recorded, f"update {updates - 1}", case.processes)


def read(recorded: Any, mark: str, world_size: int) -> Measured:
    """Peak and traffic between the start and the end of `mark`."""
    results = recorded.profiler.kineto_results
    begin, end = next(
        (e.start_ns(), e.start_ns() + e.duration_ns()) for e in results.events() if e.name() == mark
    )
    return Measured(_peak(results, begin, end), _sent(results, begin, end, world_size))


def _peak(results: Any, begin: int, end: int) -> float:
    """Most bytes live between two times. A block that another thread freed unseen is gone when its
    address comes again; what collectives allocate inside is gloo's."""
    live: dict[int, int] = {}
    total = peak = 0
    for event in sorted(
        _allocations(results.experimental_event_tree(), False), key=lambda e: e.start_time_ns
    ):
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        if begin <= event.start_time_ns <= end:
            peak = max(peak, total)
    return peak


def _allocations(events: Any, in_collective: bool) -> Iterator[Any]:
    stack = [(event, in_collective) for event in events]
    while stack:
        event, inside = stack.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:  # noqa: SLF001 - torch has no public name
            if not inside or event.extra_fields.alloc_size < 0:
                yield event
            continue
        inside = inside or event.name.startswith(("c10d::", "gloo:"))
        stack.extend((child, inside) for child in event.children)


_SIZES = {
    "float": 4,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "double": 8,
    "long int": 8,
    "int": 4,
    "unsigned char": 1,
}


def _sent(results: Any, begin: int, end: int, world_size: int) -> float:
    """Bytes that a ring would send from one process: gloo reduces-and-scatters by reducing to all,
    which is not counted twice."""
    share, sent = (world_size - 1) / world_size, 0.0
    for event in results.events():
        if not begin <= event.start_ns() <= end or not event.shapes() or not event.dtypes():
            continue
        shape, size = event.shapes(), _SIZES.get(event.dtypes()[0], 0)
        if event.name() == "gloo:all_reduce":
            sent += 2 * share * size * _product(shape[0])
        elif event.name() == "c10d::_reduce_scatter_base_":
            sent -= share * size * _product(shape[1])
        elif event.name() == "c10d::_allgather_base_":
            sent += share * size * _product(shape[0])
    return sent


def _product(shape: list[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


_GATHERS = ("all_gather_single", "_allgather_base")  # as torch calls them since 2.13, and before
_SCATTERS = ("reduce_scatter_single", "_reduce_scatter_base")


def settle_collectives() -> None:
    """Let gloo's threads drop their hold on a buffer before ours does, so that its memory is freed
    where it is recorded."""
    import torch.distributed as dist
    from torch.nn.parallel import distributed

    def settled(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = function(*args, **kwargs)
            work.wait()
            time.sleep(0.005)
            return work

        return call

    # DDP's first broadcast of the weights, which are equal already, would end on those threads.
    distributed._sync_module_states = lambda *args, **kwargs: None  # noqa: SLF001 - torch has no public name
    for name in ("allreduce", "allgather", "broadcast", *_GATHERS, *_SCATTERS):
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, settled(getattr(dist.ProcessGroup, name)))


def worker(folder: Path, out: Path, names: list[str]) -> None:
    """Measure the named cases one after the other in this process; the first process writes
    them."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    settle_collectives()
    results = {}
    for name in names:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        measured = measure(folder, case_named(name))
        results[name] = {"peak": measured.peak, "sent": measured.sent}
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(results))


def launch(folder: Path, names: list[str]) -> dict[str, Measured]:
    """Measure the named cases in processes of their own, those of one number of processes
    together."""
    results: dict[str, Measured] = {}
    for processes in (1, 2):
        chosen = [name for name in names if case_named(name).processes == processes]
        if not chosen:
            continue
        out = folder / f"measured-{processes}.json"
        command = [sys.executable, "-m"]
        if processes > 1:
            command += [
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
                "-m",
            ]
        command += ["benchmarks.footprint", "--measure", str(folder), str(out), *chosen]
        finished = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
        if finished.returncode:
            raise RuntimeError(finished.stderr[-4000:])
        results |= {name: Measured(**found) for name, found in json.loads(out.read_text()).items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE"
    )
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, out, *names = options.measure
        worker(Path(folder), Path(out), names)
        return
    # Libraries print warnings where the table goes.
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(sys.stderr):
        folder = Path(made)
        make_files(folder)
        measured = launch(folder, options.cases)
        lines = [
            "Estimated by `accum-trainer plan` against measured, per process: Llama of 9M "
            f"parameters, B={BATCH}, {TOKENS} tokens, K={K}, CPU, {os.cpu_count()} cores, 2 "
            f"processes over gloo, torch {torch.__version__}, {platform.machine()}. Peak: torch's "
            "allocator, in an update; sent: collectives, as a ring's bytes per update",
            "",
            "| case | peak, estimated MB | measured MB | ratio | sent, estimated MB | measured MB "
            "| ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in options.cases:
            case, found = CASES[name], measured[name]
            expected = estimate(folder, case)
            sent = expected.traffic[case.grad_sync]
            ratio = f"{sent / found.sent:.3f}" if found.sent else "-"
            lines.append(
                f"| {name} | {expected.total / 1e6:.1f} | {found.peak / 1e6:.1f} | "
                f"{expected.total / found.peak:.2f} "
                f"| {sent / 1e6:.1f} | {found.sent / 1e6:.1f} | {ratio} |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
