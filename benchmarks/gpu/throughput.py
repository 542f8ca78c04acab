"""Tokens per second and peak memory against transformers.Trainer: the same model, rows, order,
batch and precision.

    python -m benchmarks.gpu.throughput --measure LOOP SETTING-AS-JSON

Each loop runs in a process of its own, in turn, several rounds: what one leaves in memory, compiles
or breaks does not touch another. Useful tokens are those of the samples, padding not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import processes
from benchmarks.gpu.models import SIZES, Ragged, llama
from benchmarks.gpu.part import Result, Setting, Table, last_words

LOOPS = {
    "trainer": "`transformers.Trainer`, padded",
    "padded": "accum_trainer, padded",
    "packed-sdpa": "accum_trainer, packed, sdpa",
    "packed-flex_attention": "accum_trainer, packed, flex_attention",
}
WARM_UP = 2
LIMIT = 90.0  # seconds for one loop in one round
ROUNDS = 3
STARTING = 15.0  # seconds of a part that go into starting its process
MARK = "MEASURED "

# Dense bf16 with float32 accumulation, operations per second; NVIDIA's data sheets and architecture
# papers, where those with sparsity are twice as high. The first name that is in the GPU's own.
PEAKS = {
    "B200": 2250e12,  # Blackwell data sheet
    "H200": 989e12,  # H200 data sheet
    "H100 PCIe": 756e12,  # H100 data sheet
    "H100 NVL": 835e12,  # H100 data sheet
    "H100": 989e12,  # H100 data sheet, SXM
    "A100": 312e12,  # A100 data sheet
    "L40S": 362e12,  # L40S data sheet
    "L4": 121e12,  # L4 data sheet
    "A10": 125e12,  # A10 data sheet
    "RTX 4090": 165e12,  # Ada architecture paper
    "RTX 3090": 71e12,  # GA102 architecture paper
}
HEADER = [
    "loop",
    "useful tokens/s",
    "range",
    "over Trainer",
    "peak GB",
    "peak over Trainer",
    "MFU of useful tokens",
]


def throughput(setting: Setting) -> Result:
    result = Result(Table(HEADER, []))
    loops = [name for name in LOOPS if not (setting.cpu and "flex" in name)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    begun = time.monotonic()
    for number in range(1 if setting.small else ROUNDS):
        passed = time.monotonic() - begun
        if number and passed * (number + 1) / number > setting.limit - STARTING:
            break  # another round as long as the mean of those before would not end in time
        for name in loops if number % 2 == 0 else loops[::-1]:
            if len(found[name]) < number:
                continue  # it failed before
            outcome = _launch(setting, name, number)
            if isinstance(outcome, str):
                result.check(f"{LOOPS[name]}: runs", False, outcome)
            else:
                found[name].append(outcome)
    speed = {
        name: statistics.median(run["speed"] for run in runs)
        for name, runs in found.items()
        if runs
    }
    peak = {name: max(run["peak"] for run in runs) for name, runs in found.items() if runs}
    device_peak = None if setting.cpu else peak_of(torch.cuda.get_device_name(0))
    for name in speed:
        speeds = [run["speed"] for run in found[name]]
        per_token = 6 * found[name][0]["parameters"]
        mfu = f"{per_token * speed[name] / device_peak:.1%}" if device_peak else "peak unknown"
        row = [LOOPS[name], f"{speed[name]:,.0f}", f"{min(speeds):,.0f} to {max(speeds):,.0f}"]
        against = [
            f"{one[name] / one['trainer']:.2f}" if "trainer" in one else "-"
            for one in (speed, peak)
        ]
        result.table.rows.append([*row, against[0], f"{peak[name]:.2f}", against[1], mfu])
    result.check(
        "all loops were measured", len(speed) == len(loops), f"{len(speed)} of {len(loops)}"
    )
    losses = {name: runs[0]["loss"] for name, runs in found.items() if runs}
    if losses:
        # Random weights: the loss is near the logarithm of the vocabulary, and the same before the
        # first update.
        spread = max(losses.values()) / min(losses.values()) - 1
        words = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        result.check("the first update has one loss", spread <= 5e-3, words)
    size, batch, k, updates = _sizes(setting)
    millions = next((run["parameters"] for runs in found.values() for run in runs), 0) / 1e6
    result.notes.append(
        f"Llama of {millions:.0f}M parameters ({size}), random weights in float32 under bf16 "
        f"autocast, AdamW, clipping; B={batch}, K={k}; {updates} updates after {WARM_UP}, "
        f"{max(map(len, found.values()))} rounds; lengths "
        f"log-normal, median {_median(setting)}, up to {8 * _median(setting)}. MFU: 6 N operations "
        "per token, N all parameters, over the device's dense bf16 peak"
        + (f" of {device_peak / 1e12:.0f} TFLOP/s by NVIDIA's data sheet." if device_peak else ".")
    )
    return result


def peak_of(name: str) -> float | None:
    """Operations per second of a GPU, None where the table does not have it."""
    words = name.replace("-", " ").split()
    return next(
        (peak for known, peak in PEAKS.items() if all(word in words for word in known.split())),
        None,
    )


def _sizes(setting: Setting) -> tuple[str, int, int, int]:
    """Model, B, K, updates."""
    return ("1M", 4, 2, 2) if setting.small else ("0.5B", 8, 8, 5)


def _median(setting: Setting) -> int:
    return 16 if setting.small else 192


def _launch(setting: Setting, name: str, number: int) -> dict[str, float] | str:
    """What one loop measured in a process of its own, or its last words."""
    log = setting.place("logs") / f"{name}-{number}.txt"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.throughput",
        "--measure",
        name,
        json.dumps(vars(setting)),
    ]
    limit = LIMIT * setting.patience
    status = processes.run(command, log, limit, os.environ)
    said = log.read_text(errors="replace")
    found = [line for line in said.splitlines() if line.startswith(MARK)]
    if status == 0 and found:
        return json.loads(found[-1].removeprefix(MARK))
    return f"{processes.how_it_ended(status, limit)}; its last words:\n{last_words(said, 6)}"


def measure(name: str, setting: Setting) -> dict[str, float]:
    """Useful tokens per second over the updates, peak memory in 10^9 bytes, and the loss of the
    first update."""
    from accum_trainer.engine.memory import peak_gb, reset_peak

    size, batch, k, updates = _sizes(setting)
    device = torch.device(setting.device)
    model = llama(size)
    rows = Ragged(
        (WARM_UP + updates + 1) * batch * k, _median(setting), 8 * _median(setting), SIZES[size][-1]
    )
    if setting.cpu:  # a GPU's allocator counts from the process's start, and has not started yet
        reset_peak(device)
    loop = (
        _trainer(setting, model, rows, batch, k)
        if name == "trainer"
        else _ours(setting, name, model, rows, batch, k)
    )
    for _ in range(WARM_UP):
        first_loss = next(loop)
    _settle(setting)
    begun = time.perf_counter()
    for _ in range(updates):
        next(loop)
    _settle(setting)
    seconds = time.perf_counter() - begun
    tokens = rows.lengths[WARM_UP * batch * k : (WARM_UP + updates) * batch * k].sum()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "speed": tokens / seconds,
        "peak": peak_gb(device),
        "parameters": parameters,
        "loss": first_loss,
    }


def _settle(setting: Setting) -> None:
    if not setting.cpu:
        torch.cuda.synchronize()


def _ours(
    setting: Setting, name: str, model: Any, rows: Ragged, batch: int, k: int
) -> Iterator[float]:
    """One update per `next`: the loss of the first one."""
    from accum_trainer import Accumulator, causal_lm_loss
    from accum_trainer.losses.packing import find_packing
    from accum_trainer.sources.collating import PackingCollator, PaddingCollator
    from accum_trainer.window_plan import Cut

    layout, _, attention = name.partition("-")
    if attention:
        model.set_attn_implementation(attention)
    acc = Accumulator(
        micro_batch_size=batch,
        global_batch_size=batch * k,
        max_grad_norm=1.0,
        cpu=setting.cpu,
        mixed_precision="bf16",
    )
    model, optimizer = acc.prepare(
        model.train(), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    )
    collate: Any = PaddingCollator(0, 1 if setting.cpu else 8)
    if layout == "packed":
        tokens = torch.tensor(rows[0]["input_ids"], device=acc.device)
        found = find_packing(
            acc.engine.unwrap(model), tokens, most=int(rows.lengths.max()) * batch, is_16_bit=True
        )
        if not found.holds:
            raise SystemExit(f"packed samples would see each other: {found.reason}")
        collate = PackingCollator(found.boundaries)
    cut = Cut(batch, packed=layout == "packed")
    windows = acc.windows(
        rows, collate_fn=collate, lengths=rows.lengths, shuffle=False, cut=cut, prefetch=True
    )
    first_loss = None
    for window in windows:
        for micro_batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, micro_batch))
        update = acc.step(optimizer)
        first_loss = update.loss if first_loss is None else first_loss
        yield first_loss


def _trainer(setting: Setting, model: Any, rows: Ragged, batch: int, k: int) -> Iterator[float]:
    """The same of `transformers.Trainer`, which logs the first update in the course of the
    second."""
    from benchmarks import ragged

    class Tokenizer:
        pad_token_id = 0

    options = {
        "use_cpu": setting.cpu,
        "bf16": True,
        "per_device_train_batch_size": batch,
        "optim": "adamw_torch_fused",
    }
    options |= {"output_dir": str(setting.place("trainer")), "logging_strategy": "steps"}
    options |= {"logging_first_step": True, "logging_steps": 1_000_000}
    order = list(range(len(rows)))
    logged: list[dict[str, float]] = []
    loop = ragged.trainer("trainer", model, Tokenizer(), rows, k, order, logged=logged, **options)  # type: ignore[arg-type]
    for _ in loop:
        yield logged[0]["loss"] if logged else float("nan")


if __name__ == "__main__":
    _, which, given = sys.argv[1:]
    print(MARK + json.dumps(measure(which, Setting(**json.loads(given)))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the Trainer waits in a thread for an update that nobody asks for
