"""Bytes and collectives of one update: every engine, policy and K, full and LoRA, beside the peers
in the same run.

    python benchmarks/traffic.py [--engines ddp zero2] [--out FILE.md] (about 4 minutes on 2 cores)

Two processes train a small Llama over gloo on the CPU; the collectives of the fourth update are
recorded (`collectives.py`, which is checked before anything is measured). Where the kernel lends a
network namespace (Linux with `unshare`), the bytes that really pass the loopback interface are
compared with what gloo's algorithms send for the collectives counted: one unseen would be too much
there.

Counted are the bytes of the buffer that is reduced or gathered, as one process sees it (what a ring
sends for it: 2 (W-1)/W of an all-reduced buffer, (W-1)/W of one that is gathered or
reduced-and-scattered):

    gradients   float32 buffers that are reduced
    weights     float32 buffers that are gathered
    other       counts, losses and norms (float64, or one number), and the buffers that DDP sends

What must hold is asserted: see `expected_gradient`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.collectives import Recorder, W, check_counting

BATCH, TOKENS, RANK = 1, 8, 8
VOCABULARY, HIDDEN, INNER, LAYERS = 257, 64, 171, 3  # odd ones, so that sharding has to pad
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ONCE, EVERY = "once-per-window", "every-microbatch"
PEERS = {"accelerate": "accelerate `accumulate()`, DDP"} | {
    f"deepspeed{n}": f"DeepSpeed `engine.backward; engine.step`, ZeRO-{n}" for n in (1, 2, 3)
}
PEER_OF = {"ddp": "accelerate", "zero1": "deepspeed1", "zero2": "deepspeed2", "zero3": "deepspeed3"}
KS = (1, 2, 8)
SHARDS_WEIGHTS = ("zero3", "fsdp2")
# Weights below it stay whole under ZeRO-3 unless all do: DeepSpeed's default, 100,000 numbers,
# would keep this whole model.
PERSISTENT = 1000


@dataclass(frozen=True)
class Case:
    """One training: an engine of ours under a policy for gradients and one for weights, or a peer
    (whose policies are its own)."""

    engine: str
    lora: bool = False
    policy: str = ONCE
    k: int = 1
    weights: str = EVERY

    @property
    def is_peer(self) -> bool:
        return self.engine in PEERS


# --- what is trained ---


def make_model(lora: bool) -> torch.nn.Module:
    """182,210 numbers, or 29,208 of an adapter on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            mlp_bias=True,
            use_cache=False,
        )
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return model


def expected_gradient(case: Case, shapes: list[torch.Size]) -> int:
    """Bytes of gradient that an update must exchange; `shapes` of the trained parameters.

    Once, or K times where each micro-batch is reduced. A buffer that is scattered is padded so that
    each process has as much: FSDP2 pads each parameter's rows to a multiple of W, ZeRO-3 each
    parameter's numbers. DDP, ZeRO-1 and ZeRO-2 pad nothing there (ZeRO-1 and 2 pad the flat weights
    that they gather after the step to a multiple of 2 W).
    """
    if case.engine == "fsdp2":
        numbers = sum(-(-s[0] // W) * W * math.prod(s[1:]) for s in shapes)
    elif case.engine in ("zero3", "deepspeed3"):
        numbers = sum(-(-math.prod(s) // W) * W for s in shapes)
    else:
        numbers = sum(math.prod(s) for s in shapes)
    if case.is_peer:
        each = case.engine in ("deepspeed2", "deepspeed3")
    else:
        each = case.policy == EVERY and case.engine != "zero1"
    return 4 * numbers * (case.k if each else 1)


def _zero(case: Case) -> dict[str, Any]:
    stage = int(case.engine[-1])
    if stage < 3 or case.weights == ONCE:
        return {"stage": stage}
    return {"stage": stage, "stage3_param_persistence_threshold": PERSISTENT}


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _rows(case: Case) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (5 * BATCH * case.k * W, TOKENS), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def ours(case: Case, model: torch.nn.Module) -> Callable[[], None]:
    """Our loop; each call of what is returned makes one update."""
    from accum_trainer import Accumulator, causal_lm_loss

    options: dict[str, Any] = {"fsdp": True} if case.engine == "fsdp2" else {}
    if case.engine.startswith("zero"):
        from accelerate.utils import DeepSpeedPlugin

        stage = int(case.engine[-1])
        config = {"zero_optimization": _zero(case)} | dict.fromkeys(
            ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"), "auto"
        )
        options = {"zero_stage": stage, "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
    acc = Accumulator(
        micro_batch_size=BATCH,
        gradient_accumulation_steps=case.k,
        grad_sync=case.policy,
        weight_sync=case.weights,
        max_grad_norm=1.0,
        cpu=True,
        **options,
    )
    assert acc.engine.name == case.engine, acc.engine.name
    model, optimizer = acc.prepare(model, _optimizer(model))
    windows = iter(acc.windows(_rows(case), prefetch=True))

    def update() -> None:
        window = next(windows)
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        acc.step(optimizer)

    return update


def with_accelerate(case: Case, model: torch.nn.Module) -> Callable[[], None]:
    """The loop of accelerate's guide "Performing gradient accumulation"."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(gradient_accumulation_steps=case.k, cpu=True)
    assert accelerator.num_processes == W
    model, optimizer, loader = accelerator.prepare(
        model, _optimizer(model), DataLoader(_rows(case), BATCH)
    )
    batches = iter(loader)

    def update() -> None:
        for _ in range(case.k):
            batch = next(batches)
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    return update


def with_deepspeed(case: Case, model: torch.nn.Module) -> Callable[[], None]:
    """The loop of DeepSpeed's getting-started page: K is in its configuration."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": case.k,
        "zero_optimization": _zero(case),
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)
    mine = _rows(case)[torch.distributed.get_rank() :: W]
    batches = iter([{name: value[None] for name, value in row.items()} for row in mine])

    def update() -> None:
        for _ in range(case.k):
            engine.backward(engine(**next(batches)).loss)
            engine.step()

    return update


# --- one launch ---


def measure(case: Case, wire: bool) -> dict[str, Any]:
    """Train here and count the fourth update: every engine has settled (DDP orders its buckets,
    ZeRO-3 watches)."""
    model = make_model(case.lora)
    trained = [p.shape for p in model.parameters() if p.requires_grad]
    weights = 4 * sum(p.numel() for p in model.parameters())
    loop = (
        ours
        if not case.is_peer
        else with_accelerate
        if case.engine == "accelerate"
        else with_deepspeed
    )
    update = loop(case, model)
    for _ in range(3):
        update()
    before = _loopback(wire)
    with Recorder() as seen:
        update()
    passed = _loopback(wire) - before
    found: dict[str, Any] = {"trained": 4 * sum(map(math.prod, trained)), "all": weights}
    for kind in ("gradients", "weights", "other"):
        those = [c for c in seen.collectives if c.kind == kind]
        found[kind] = {"bytes": sum(c.bytes for c in those), "collectives": len(those)}
    if wire:
        more = passed - sum(c.on_the_wire for c in seen.collectives)
        found["wire"] = more / len(seen.collectives)
    expected = expected_gradient(case, trained)
    assert found["gradients"]["bytes"] == expected, (case, found, expected)
    assert found["other"]["bytes"] < 1000 * case.k, (case, found)
    return found


def _loopback(wire: bool) -> int:
    """Bytes that have left over the loopback interface, all processes together, once none is on its
    way."""
    if not wire:
        return 0
    torch.distributed.barrier()
    time.sleep(0.05)
    line = next(
        line
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("lo:")
    )
    sent = int(line.split(":")[1].split()[8])
    time.sleep(0.05)
    return sent


def worker(out: str, wire: bool, cases: list[Case]) -> None:
    """Measure the cases one after the other in this process; the first process writes them."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    check_counting()
    results = []
    for case in cases:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate sets it for good
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        begun = time.perf_counter()
        results.append(measure(case, wire))
        if torch.distributed.get_rank() == 0:
            print(case, f"{time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@functools.cache
def own_network() -> tuple[str, ...]:
    """Command to run something in a network of its own, where nobody else's bytes pass; empty where
    there is none."""
    prefix = (
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "sh",
    )
    try:
        usable = subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        usable = False
    return prefix if usable else ()


def launch(cases: list[Case], wire: bool = False) -> dict[Case, dict[str, Any]]:
    """Measure the cases in one launch of two processes; `wire` also counts the bytes on the network
    interface."""
    # DeepSpeed puts a linear function of its own in torch's place when it first builds ZeRO-3: that
    # goes last.
    ordered = sorted(cases, key=lambda case: case.engine[-1] == "3")
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {
        n: v
        for n, v in os.environ.items()
        if n not in launchers and not n.startswith("ACCELERATE_")
    }
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if wire:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [
            *(own_network() if wire else ()),
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
        ]
        command += [f"--nproc_per_node={W}", __file__, "--measure", str(out), str(int(wire))]
        command += [json.dumps(vars(case)) for case in ordered]
        finished = subprocess.run(command, env=env, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(finished.stderr[-4000:])
        return dict(zip(ordered, json.loads(out.read_text()), strict=True))


# --- the table ---


def multiple(part: float, whole: float) -> str:
    """`1` where it is exactly one, else four digits, or as many as tell it from a whole number:
    `14.59`, `1.00003`."""
    if part % whole == 0:
        return str(int(part // whole))
    return next(text for digits in range(4, 18) if "." in (text := f"{part / whole:.{digits}g}"))


def tables(results: dict[Case, dict[str, Any]]) -> list[str]:
    def of(
        engine: str, lora: bool, policy: str = ONCE, weights: str = EVERY
    ) -> list[dict[str, Any]]:
        return [results[Case(engine, lora, policy, k, weights)] for k in KS]

    ks = " / ".join(map(str, KS))
    engines = [engine for engine in ENGINES if Case(engine) in results]
    lines = [
        f"| engine | trains | grad_sync | weight_sync | gradients, x trained bytes, K = {ks} | "
        "collectives | weights gathered, x the model's bytes | collectives | other, bytes | "
        "collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for engine in engines:
        for lora in (False, True):
            for policy, weights in policies_of(engine):
                found = of(engine, lora, policy, weights)
                cells = [engine, "LoRA r=8" if lora else "all", policy]
                cells.append(weights if engine in SHARDS_WEIGHTS else "-")
                for kind, unit in (("gradients", "trained"), ("weights", "all"), ("other", "")):
                    sizes = [
                        multiple(f[kind]["bytes"], f[unit]) if unit else str(f[kind]["bytes"])
                        for f in found
                    ]
                    cells += [
                        " / ".join(sizes),
                        " / ".join(str(f[kind]["collectives"]) for f in found),
                    ]
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| peer, plain | trains | gradients, x trained bytes, K = {ks} | weights gathered, x the "
        "model's bytes | ours once-per-window / peer, gradients | ours / peer, all bytes |",
        "|---|---|---|---|---|---|",
    ]
    for engine in (engine for engine in engines if engine in PEER_OF):
        for lora in (False, True):
            kept = ONCE if engine in SHARDS_WEIGHTS else EVERY
            peer, mine = of(PEER_OF[engine], lora), of(engine, lora, weights=kept)
            cells = [PEERS[PEER_OF[engine]], "LoRA r=8" if lora else "all"]
            cells.append(" / ".join(multiple(p["gradients"]["bytes"], p["trained"]) for p in peer))
            cells.append(" / ".join(multiple(p["weights"]["bytes"], p["all"]) for p in peer))
            pairs = list(zip(mine, peer, strict=True))
            cells.append(
                " / ".join(
                    f"{m['gradients']['bytes'] / p['gradients']['bytes']:.4g}" for m, p in pairs
                )
            )
            cells.append(" / ".join(f"{_all_bytes(m) / _all_bytes(p):.4g}" for m, p in pairs))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def policies_of(engine: str) -> list[tuple[str, str]]:
    """(for gradients, for weights), the second of which matters to few."""
    return [
        (policy, weights)
        for policy in (ONCE, EVERY)
        for weights in ((ONCE, EVERY) if engine in SHARDS_WEIGHTS else (EVERY,))
    ]


def _all_bytes(found: dict[str, Any]) -> int:
    return sum(found[kind]["bytes"] for kind in ("gradients", "weights", "other"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", help="also write the tables to this file")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        out, wire, *cases = options.measure
        worker(out, wire == "1", [Case(**json.loads(case)) for case in cases])
        return
    kinds = [
        (engine, lora, policy, weights)
        for engine in options.engines
        for lora in (False, True)
        for policy, weights in policies_of(engine)
    ]
    kinds += [
        (PEER_OF[engine], lora, ONCE, EVERY)
        for engine in options.engines
        if engine in PEER_OF
        for lora in (False, True)
    ]
    wire = bool(own_network())
    results = launch(
        [
            Case(engine, lora, policy, k, weights)
            for engine, lora, policy, weights in kinds
            for k in KS
        ],
        wire,
    )
    sizes = {case.lora: found["trained"] for case, found in results.items()}
    if wire:
        seen = [found["wire"] / 1e3 for found in results.values()]
        on_wire = (
            "On the loopback interface of the run's own network passed what gloo sends for the "
            f"collectives counted, and {statistics.median(seen):.1f} KB (median, at most "
            f"{max(seen):.1f}) more for each: headers, acknowledgements, the launcher's heartbeat"
        )
    else:
        on_wire = "No network namespace here: bytes on the interface were not compared"
    lines = [
        "Traffic of one update: buffers that one process hands to collectives. Llama, trained "
        f"whole {sizes[False]:,} bytes of gradient, LoRA r={RANK} {sizes[True]:,}; float32, W={W} "
        f"over gloo, CPU, {platform.machine()}, torch {version('torch')}, accelerate "
        f"{version('accelerate')}, deepspeed {version('deepspeed')}, peft {version('peft')}. "
        f"ZeRO-3 keeps weights below {PERSISTENT:,} numbers whole, unless weight_sync keeps all. "
        f"{on_wire}. {len(results)} cases, each asserted against what it must be.",
        "",
        *tables(results),
        "",
        "Above 1 at once-per-window is padding to equal shards: FSDP2 pads each parameter's rows "
        "to a multiple of W, ZeRO-3 its numbers; ZeRO-1 and ZeRO-2 reduce unpadded, and pad the "
        "flat weights that they gather to a multiple of 2 W. ZeRO-1 reduces at a window's end "
        "whatever the policy. weight_sync=once-per-window gathers as often at any K. "
        "DeepSpeed has `coalesce_grad_reduction()` too, which is what grad_sync=once-per-window "
        "uses; the plain loop does not call it. accelerate has no FSDP2 on the CPU to compare "
        "with.",
    ]
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
