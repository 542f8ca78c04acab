"""How often the host waits for the device: in a window's micro-batches and in its step, of
`train`'s own loop.

On a GPU the profiler sees the runtime's calls. On a CPU nothing waits; the operators that would are
counted there as they are called (`aten::_local_scalar_dense` is what `.item()` and `float()` end
in). They are called on tensors of the host too, where they cost nothing: who calls them, on what,
is said below the table, as seen one window later.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accum_trainer.errors import ConfigError
from accum_trainer.lm.packed_attention import PACKED_SDPA
from benchmarks.gpu.part import Result, Setting, Table, one_line

K = 8
OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero")
STREAM = "cudaStreamSynchronize"
RUNTIME = (
    STREAM,
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "Memcpy DtoH",
    "Memcpy HtoD (Page",
)


def waits(setting: Setting) -> Result:
    result = Result(
        Table(["layout", "event", "in all micro-batches", "per micro-batch", "in the step"], [])
    )
    layouts = [("padded", None), ("packed", "sdpa"), ("packed", PACKED_SDPA)]
    for layout, attention in layouts:
        name = f"{layout}, {attention}" if attention else layout
        try:
            inside, step, kinds, callers, layers, count = _count(setting, layout, attention)
        except ConfigError as error:
            result.notes.append(f"{name}, refused: {error}")
            continue
        for event in (*OPERATORS, *(() if setting.cpu else RUNTIME)):
            found = [inside[event], inside[event] / count, step[event]]
            result.table.rows.append([name, event, *found])
        result.check(f"{name}: the window was seen", kinds > 20, f"{kinds} kinds of events")
        if not setting.cpu:
            words = f"{inside[STREAM]} in {count} micro-batches of {layers} layers"
            result.check(f"{name}: the layers do not wait", inside[STREAM] < layers * count, words)
        called = "; ".join(f"{caller} {count}" for caller, count in callers.most_common(8))
        result.notes.append(
            f"{name}, callers in a window and its step, forwards only on a GPU: {called}."
        )
    result.notes.append(
        "The third update, its micro-batches and its step each under a profiler of its own, in "
        f"{'float32' if setting.cpu else 'bf16'}."
    )
    return result


def _count(
    setting: Setting, layout: str, attention: str | None
) -> tuple[Counter[str], Counter[str], int, Counter[str], int, int]:
    """Events in the micro-batches and in the step of the third window, kinds of events, who calls,
    the model's layers, the micro-batches: K, or fewer if packed."""
    from accelerate.state import AcceleratorState, GradientState

    from accum_trainer import TrainConfig
    from accum_trainer.lm.model import blocks_of
    from accum_trainer.train.setup import assemble

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    batch = 1 if setting.small else 4
    sizes: dict[str, Any] = {"batch_size": batch, "gradient_accumulation_steps": K}
    sizes["max_seq_len"] = 64 if setting.small else 512
    sizes["mixed_precision"] = "no" if setting.cpu else "bf16"
    parts = assemble(
        TrainConfig(cpu=setting.cpu, layout=layout, attention=attention, steps=10, **sizes)
    )
    micro_batches = 0
    callers, profiles = _Callers(), [_profile(setting), _profile(setting)]
    for number, window in zip(range(4), parts.windows, strict=False):
        if number == 2:
            micro_batches = window.num_micro_batches
        if number < 3:
            _update(parts, window, *(profiles if number == 2 else [contextlib.nullcontext()] * 2))
            continue
        try:
            _update(parts, window, callers, callers)
        except (
            Exception
        ) as error:  # of any type: some kernels cannot be looked into; the counts are there
            callers.found[f"not seen, {one_line(error)}"] += 1
    events = [list(_named(profile)) for profile in profiles]
    inside, step = (Counter(dict.fromkeys((*OPERATORS, *RUNTIME), 0)) for _ in range(2))
    for counter, found in zip((inside, step), events, strict=True):
        for event, count in found:
            for wanted in (*OPERATORS, *RUNTIME):
                counter[wanted] += count if event.startswith(wanted) else 0
    layers = len(blocks_of(parts.accumulator.engine.unwrap(parts.model)))
    return inside, step, len(events[0]), callers.found, layers, micro_batches


def _update(parts: Any, window: Any, in_window: Any, in_step: Any) -> None:
    """One update as `train` makes it, its two halves each inside a context."""
    from accum_trainer import causal_lm_loss

    acc = parts.accumulator
    with in_window:
        for micro_batch in window:
            with acc.accumulate(parts.model):
                acc.backward(causal_lm_loss(parts.model, micro_batch))
    with in_step:
        acc.step(parts.optimizer, parts.scheduler)


def _profile(setting: Setting) -> Any:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [] if setting.cpu else [torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(activities=kinds)


def _named(profile: Any) -> Iterator[tuple[str, int]]:
    for event in profile.key_averages():
        yield event.key, event.count


class _Callers(TorchDispatchMode):
    """Notes from where the operators are called and on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name in OPERATORS:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            place = "/".join(frames[-1].filename.split("/")[-2:])
            self.found[
                f"{name.removeprefix('aten::')} on {args[0].device.type}, "
                f"{place}:{frames[-1].lineno}"
            ] += 1
        return function(*args, **(kwargs or {}))
