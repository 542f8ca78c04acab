"""Memory that really runs out: the update is that of unlimited memory; the batch size that `auto`
finds; and what leaves the GPU with `--activation-offload`.

On a GPU torch's allocator is limited (`set_per_process_memory_fraction`), on a CPU the address
space of the process. The model makes the blocks that do not fit as large as they are on both.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from benchmarks.gpu.part import Result, Setting, Table
from benchmarks.gpu.training import place, train
from tests.exhausting import WIDTH, Wide

SAMPLES = 16
# Of what the activations of all samples at once take: two micro-batches of 8 do not fit beside each
# other either.
ROOM = 0.6
SAME = 1e-6
LEFT = 4e9  # bytes of a GPU that `--batch-size auto` may fill


def memory(setting: Setting) -> Result:
    result = Result(Table(["what", "found"], []))
    _out_of_memory(setting, result)
    _batch_size_auto(setting, result)
    _activation_offload(setting, result)
    return result


def _out_of_memory(setting: Setting, result: Result) -> None:
    """One update of 16 samples, unlimited and limited; the gradient of sum(relu(x w)^2) is 2 relu(x
    w) x by hand."""
    x = torch.linspace(-1, 1, SAMPLES).unsqueeze(1)
    free = _update(setting, x)
    with _limited(setting.device, int(ROOM * 2 * SAMPLES * WIDTH * 4)):
        limited = _update(setting, x)
    weight = Wide().weight.detach().double()
    exact = sum(2 * (s.double() * weight).relu() * s.double() for s in x) / SAMPLES
    by_hand = float((limited["gradient"].double() - exact).norm() / exact.norm())
    apart = float((limited["gradient"] - free["gradient"]).norm() / free["gradient"].norm())
    result.table.rows += [
        ["splits with all memory", free["splits"]],
        ["splits with less", limited["splits"]],
        ["micro-batches with less", limited["given"]],
        ["update against that with all memory, relative", apart],
        ["gradient against float64 by hand, relative", by_hand],
    ]
    result.check(
        "with all memory nothing is split", free["splits"] == 0, f"{free['splits']} splits"
    )
    result.check(
        "memory ran out, and the window went on",
        limited["splits"] > 0,
        f"{limited['splits']} splits",
    )
    result.at_most("the update is that of all memory", apart, SAME)
    result.at_most("the gradient is that of float64", by_hand, SAME)


def _update(setting: Setting, x: torch.Tensor) -> dict[str, Any]:
    from accum_trainer import Accumulator

    model = Wide()
    before = model.weight.detach().clone()
    acc = Accumulator(micro_batch_size=SAMPLES, global_batch_size=SAMPLES, cpu=setting.cpu)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    data = TensorDataset(x)
    given = []
    for window in acc.windows(data, shuffle=False, count_targets=lambda batch: len(batch[0])):
        for (part,) in window:
            given.append(len(part))
            with acc.accumulate(model):
                acc.backward(model(part).sum(), reduction="sum")
        gradient = next(iter(acc.engine.full_gradients(model).values())).cpu().clone()
        update = acc.step(optimizer)
    moved = before - model.weight.detach().cpu()
    assert torch.allclose(moved, gradient, atol=1e-6), "SGD of rate 1 moves by the gradient"
    return {"gradient": gradient, "splits": update.num_splits, "given": given}


@contextlib.contextmanager
def _limited(device: str, room: int) -> Iterator[None]:
    """Let this process take `room` bytes more than it has."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    kept = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)


def _batch_size_auto(setting: Setting, result: Result) -> None:
    """A GPU that is nearly full, so that what is found is a limit and not the effective batch."""
    filled = None
    if not setting.cpu:
        from accum_trainer.speed.batch_size import MARGIN

        free, total = torch.cuda.mem_get_info()
        filled = torch.empty(
            max(0, int(free - MARGIN * total - LEFT)), dtype=torch.uint8, device="cuda"
        )
    largest = 8 if setting.small else 2048
    records = train(setting, "auto", 2, batch_size="auto", global_batch_size=largest)
    del filled
    found = json.loads((place(setting, "auto") / "plan.json").read_text())["batch_size_found"]
    peak, splits = (
        max(record["peak_gb"] for record in records),
        sum(record["oom_splits"] for record in records),
    )
    result.table.rows += [
        ["--batch-size auto: samples found", found["micro_batch_size"]],
        ["samples tried", ", ".join(found["tried"])],
        ["needed, GB", found["needed_gb"]],
        ["limit, GB", found["limit_gb"]],
        ["peak while training, GB", peak],
        ["splits while training", splits],
    ]
    result.check(
        "auto found a micro-batch", found["micro_batch_size"] >= 1, str(found["micro_batch_size"])
    )
    result.check(
        "its peak is below the limit",
        peak <= found["limit_gb"],
        f"{peak:.3f} of {found['limit_gb']:.3f} GB",
    )
    result.check("it never ran out", splits == 0, f"{splits} splits")
    if not setting.cpu:
        words = f"{found['micro_batch_size']} of {largest} samples"
        result.check("memory is what limits it", found["micro_batch_size"] < largest, words)


def _activation_offload(setting: Setting, result: Result) -> None:
    """The built-in model's four blocks keep an input each, of B x T x 128 float32 numbers."""
    samples, tokens = (2, 64) if setting.small else (64, 512)
    losses, peaks = [], []
    for name, offloads in (("kept", False), ("offloaded", True)):
        records = train(
            setting,
            name,
            3,
            batch_size=samples,
            global_batch_size=2 * samples,
            max_seq_len=tokens,
            layout="padded",
            gradient_checkpointing=True,
            activation_offload=offloads,
        )
        losses.append([record["loss"] for record in records])
        peaks.append(max(record["peak_gb"] for record in records))
    result.table.rows += [
        ["peak with checkpointing, GB", peaks[0]],
        ["peak with --activation-offload too, GB", peaks[1]],
    ]
    result.check(
        "losses with --activation-offload",
        losses[0] == losses[1],
        "equal to the bit to those without",
    )
    if not setting.cpu:
        result.check(
            "--activation-offload takes less memory",
            peaks[1] < peaks[0],
            f"{peaks[1]:.3f} against {peaks[0]:.3f} GB",
        )
