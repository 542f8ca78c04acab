"""Tokens per second and peak memory against transformers.Trainer: the same model, rows, order,
batch and precision.

    python -m benchmarks.gpu.throughput --measure MODEL LOOP SETTING-AS-JSON [--profile]

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

from accum_trainer.speed.peaks import peak_flops
from benchmarks.gpu import processes
from benchmarks.gpu.models import SIZES, Ragged, llama
from benchmarks.gpu.part import Result, Setting, Table, last_words

LOOPS = {
    "trainer": "`transformers.Trainer`, padded",
    "grouped": "`transformers.Trainer`, length grouping",
    "padded": "padded",
    "packed": "packed",
    "packed-tokens": "packed, cut by tokens",
    "packed-tokens-compiled": "packed, cut by tokens, compiled",
}
RUNS = {"0.5B": list(LOOPS), "1.5B": ["trainer", *list(LOOPS)[-2:]]}
WARM_UP = 2
LIMIT = 120.0  # seconds for one loop in one round
ROUNDS = 3
STARTING = 15.0  # seconds of a part that go into starting its process
MARK = "MEASURED "
HEADER = [
    "model",
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
    runs = {"1M": list(LOOPS)} if setting.small else RUNS
    asked = [(size, loop) for size, loops in runs.items() for loop in loops]
    found: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in asked}
    begun = time.monotonic()
    for number in range(1 if setting.small else ROUNDS):
        passed = time.monotonic() - begun
        if number and passed * (number + 1) / number > setting.limit - STARTING:
            break  # another round as long as the mean of those before would not end in time
        for run in asked if number % 2 == 0 else asked[::-1]:
            if len(found[run]) < number:
                continue  # it failed before
            left = setting.limit - STARTING - (time.monotonic() - begun)
            if left < STARTING:  # what was measured so far is kept
                result.check(f"{', '.join(run)}: runs", False, "the part's time was over")
                continue
            outcome = _launch(setting, *run, number, min(left, LIMIT * setting.patience))
            if isinstance(outcome, str):
                result.check(f"{', '.join(run)}: runs", False, outcome)
            else:
                found[run].append(outcome)
    device_peak = peak_flops(torch.device(setting.device), "bf16")
    for size in runs:
        measured = {loop: found[size, loop] for loop in runs[size] if found[size, loop]}
        _rows(result, size, measured, device_peak)
    batch, k, updates = _sizes(setting)
    longest = 8 * _median(setting)
    result.notes.append(
        f"Llamas with random weights in float32 under bf16 autocast, AdamW, clipping; B={batch}, "
        f"K={k}, cut by tokens at most {batch * longest}, which is B samples of the longest; "
        f"{updates} updates after {WARM_UP}, {max(map(len, found.values()))} rounds; lengths "
        f"log-normal, median {_median(setting)}, up to {longest}. Length grouping takes other "
        "samples. MFU counts useful work as accum_trainer.speed.flops does, over the device's "
        "dense bf16 peak"
        + (f" of {device_peak / 1e12:.0f} TFLOP/s by its data sheet." if device_peak else ".")
    )
    return result


def _rows(
    result: Result,
    size: str,
    measured: dict[str, list[dict[str, float]]],
    device_peak: float | None,
) -> None:
    """The rows of one model, and what must hold for them."""
    speed = {loop: statistics.median(r["speed"] for r in runs) for loop, runs in measured.items()}
    peak = {loop: max(run["peak"] for run in runs) for loop, runs in measured.items()}
    for loop, runs in measured.items():
        speeds = [run["speed"] for run in runs]
        used = runs[0]["flops"] * speed[loop]
        row = [f"{runs[0]['parameters'] / 1e6:.0f}M", LOOPS[loop], f"{speed[loop]:,.0f}"]
        row.append(f"{min(speeds):,.0f} to {max(speeds):,.0f}")
        row.append(_over(speed, loop))
        row += [f"{peak[loop]:.2f}", _over(peak, loop)]
        result.table.rows.append(
            [*row, f"{used / device_peak:.1%}" if device_peak else "peak unknown"]
        )
    losses = {name: runs[0]["loss"] for name, runs in measured.items() if name != "grouped"}
    if losses:
        # Random weights: the loss is near the logarithm of the vocabulary, and the same before the
        # first update.
        spread = max(losses.values()) / min(losses.values()) - 1
        words = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        result.check(f"{size}: the first update has one loss", spread <= 5e-3, words)


def _over(found: dict[str, float], loop: str) -> str:
    return f"{found[loop] / found['trainer']:.2f}" if "trainer" in found else "-"


def _sizes(setting: Setting) -> tuple[int, int, int]:
    """B, K, updates."""
    return (4, 2, 2) if setting.small else (8, 16, 4)


def _median(setting: Setting) -> int:
    return 16 if setting.small else 160


def _launch(
    setting: Setting, size: str, name: str, number: int, limit: float
) -> dict[str, float] | str:
    """What one loop measured in a process of its own in `limit` seconds, or its last words."""
    log = setting.place("logs") / f"{size}-{name}-{number}.txt"
    command = [sys.executable, "-m", "benchmarks.gpu.throughput", "--measure"]
    status = processes.run(
        [*command, size, name, json.dumps(vars(setting))], log, limit, os.environ
    )
    said = log.read_text(errors="replace")
    found = [line for line in said.splitlines() if line.startswith(MARK)]
    if status == 0 and found:
        return json.loads(found[-1].removeprefix(MARK))
    return f"{processes.how_it_ended(status, limit)}; its last words:\n{last_words(said, 6)}"


def measure(size: str, name: str, setting: Setting, profiled: bool = False) -> dict[str, float]:
    """Useful tokens per second over the updates, peak memory in 10^9 bytes, the loss of the first
    update, useful operations per token.

    Args:
        profiled: print where the time of one more update goes.
    """
    from accum_trainer.engine.memory import peak_gb, reset_peak
    from accum_trainer.speed.flops import training_flops

    batch, k, updates = _sizes(setting)
    device = torch.device(setting.device)
    with device:
        model = llama(size)
    parameters = sum(p.numel() for p in model.parameters())
    count = (WARM_UP + updates + 2) * batch * k
    rows = Ragged(count, _median(setting), 8 * _median(setting), SIZES[size][-1])
    flops = training_flops(model, rows.lengths)
    if setting.cpu:  # a GPU's allocator counts from the process's start
        reset_peak(device)
    loop = (
        _trainer(setting, name, model, rows, batch, k)
        if name in ("trainer", "grouped")
        else _ours(setting, name, model, rows, batch, k)
    )
    for _ in range(WARM_UP):
        first_loss, _ = next(loop)
    _settle(setting)
    begun = time.perf_counter()
    tokens = [next(loop)[1] for _ in range(updates)]
    _settle(setting)
    seconds = time.perf_counter() - begun
    if profiled:
        _profile(loop, setting)
    return {
        "speed": sum(tokens) / seconds,
        "peak": peak_gb(device),
        "parameters": parameters,
        "loss": first_loss,
        "flops": flops.of(sum(tokens), sum(tokens)) / sum(tokens),  # all tokens are targets
    }


def _profile(loop: Iterator[tuple[float, int]], setting: Setting) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [] if setting.cpu else [torch.profiler.ProfilerActivity.CUDA]
    begun = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profile:
        next(loop)
        _settle(setting)
    events = profile.key_averages()
    busy = sum(e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA"))
    seconds = time.perf_counter() - begun
    print(f"one update under the profiler: {seconds:.2f} s, its kernels {busy / 1e6:.2f} s")
    for sort in ("cpu",) if setting.cpu else ("device", "cpu"):
        print(events.table(sort_by=f"self_{sort}_time_total", row_limit=25))


def _settle(setting: Setting) -> None:
    if not setting.cpu:
        torch.cuda.synchronize()


def _ours(
    setting: Setting, name: str, model: Any, rows: Ragged, batch: int, k: int
) -> Iterator[tuple[float, int]]:
    """One update per `next`: the loss of the first one, tokens of this one."""
    from accum_trainer import Accumulator, causal_lm_loss
    from accum_trainer.lm.model import compile_blocks
    from accum_trainer.lm.packed_attention import attend_inside_samples
    from accum_trainer.losses.packing import find_packing
    from accum_trainer.sources.collating import PackingCollator, PaddingCollator
    from accum_trainer.window_plan import Cut

    packed, by_tokens = name.startswith("packed"), "tokens" in name
    acc = Accumulator(
        micro_batch_size=None if by_tokens else batch,
        global_batch_size=batch * k,
        max_grad_norm=1.0,
        cpu=setting.cpu,
        mixed_precision="bf16",
    )
    if packed:
        assert attend_inside_samples(model)
    model, optimizer = acc.prepare(
        model.train(), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    )
    plain, longest = acc.engine.unwrap(model), int(rows.lengths.max())
    collate: Any = PaddingCollator(0, 1 if setting.cpu else 8)
    if packed:
        tokens = torch.tensor(rows[0]["input_ids"], device=acc.device)
        found = find_packing(plain, tokens, most=longest * batch, longest=longest, is_16_bit=True)
        if not found.holds:
            raise SystemExit(f"packed samples would see each other: {found.reason}")
        collate = PackingCollator(found.boundaries)
    if name.endswith("compiled"):
        compile_blocks(plain, acc.device)
    most = 8 * _median(setting) * batch  # tokens of B samples of the longest
    cut = Cut(None, most, packed=packed) if by_tokens else Cut(batch, packed=packed)
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
        yield first_loss, window.num_tokens


def _trainer(
    setting: Setting, name: str, model: Any, rows: Ragged, batch: int, k: int
) -> Iterator[tuple[float, int]]:
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
    loop = ragged.trainer(name, model, Tokenizer(), rows, k, order, logged=logged, **options)  # type: ignore[arg-type]
    for tokens in loop:
        yield logged[0]["loss"] if logged else float("nan"), tokens


if __name__ == "__main__":
    which, name, given = sys.argv[2:5]
    profiled = sys.argv[5:] == ["--profile"]
    measured = measure(which, name, Setting(**json.loads(given)), profiled)
    print(MARK + json.dumps(measured), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the Trainer waits in a thread for an update that nobody asks for
