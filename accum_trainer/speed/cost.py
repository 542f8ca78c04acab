"""Measure the cost of micro-batches on this device: a few timed forwards and backwards.

Time is modelled as `fixed + token * tokens + square * sum of length ** 2` (`window_plan.Cost`, in
units of one token). The coefficients are fitted by least squares, once per model and device, and
cached, so that a continued run cuts its windows as before. Knows no configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from accum_trainer.data.files import cache_dir
from accum_trainer.lm.offloading import offloads_block_inputs
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.window_plan import Cost

_REPEATS = 3


def measured_cost(
    model: torch.nn.Module, max_tokens: int, max_seq_len: int, precision: str
) -> Cost:
    """The cost of micro-batches of `model`, from the cache or timed now.

    Args:
        model: as the forward runs it, in training mode, on its device, whole (not sharded).
        max_tokens, max_seq_len: the largest micro-batch and sample; nothing larger is tried.
        precision: the autocast dtype, part of the cache's key.
    """
    path = cache_dir() / "costs" / f"{_key(model, max_tokens, max_seq_len, precision)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Cost(**json.loads(path.read_text()))
    shapes = sorted({(rows, length) for rows, length in _shapes(max_tokens, max_seq_len)})
    seconds = [seconds_of(model, rows, length) for rows, length in shapes]
    terms = np.array([[1.0, rows * length, rows * length**2] for rows, length in shapes])
    # Fit relative errors: the fixed cost of a small micro-batch matters as much as the tokens of a
    # large one.
    weights = 1 / np.array(seconds)
    fixed, token, square = np.linalg.lstsq(
        terms * weights[:, None], np.ones(len(shapes)), rcond=None
    )[0]
    if token <= 0:  # too noisy: charge everything to the tokens of the largest shape
        token, square = max(seconds) / terms[:, 1].max(), 0.0
    cost = Cost(fixed=max(0.0, float(fixed / token)), square=max(0.0, float(square / token)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(cost)))
    partial.replace(path)
    return cost


def seconds_of(model: torch.nn.Module, rows: int, length: int) -> float:
    """Seconds of one forward and backward of `rows` samples of `length` tokens: the minimum of a
    few. Gradients are dropped."""
    device = next(model.parameters()).device
    ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    times = []
    with _without_trace(model):
        for _ in range(1 + _REPEATS):
            _wait(device)
            begun = time.perf_counter()
            causal_lm_loss(model, batch).backward()
            _wait(device)
            times.append(time.perf_counter() - begun)
            for parameter in model.parameters():
                parameter.grad = None
    return min(times[1:])


@contextlib.contextmanager
def _without_trace(model: torch.nn.Module) -> Iterator[None]:
    """Restore the random generators and drop gradients."""
    on_gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=on_gpu):
        yield
    for parameter in model.parameters():
        parameter.grad = None


def _shapes(max_tokens: int, max_seq_len: int) -> Iterator[tuple[int, int]]:
    for length in (max(1, max_seq_len // 16), max(1, max_seq_len // 4), max_seq_len):
        for tokens in (max_tokens // 8, max_tokens):
            yield max(1, tokens // length), length
    yield 1, max(1, max_seq_len // 16)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(model: torch.nn.Module, max_tokens: int, max_seq_len: int, precision: str) -> str:
    device = next(model.parameters()).device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    shapes: list[Any] = [
        (name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()
    ]
    checkpointing = any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    offloading = offloads_block_inputs(model)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
    how = [precision, checkpointing, offloading, attention, compiled, max_tokens, max_seq_len]
    what = [type(model).__name__, shapes, where, *how, torch.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
