"""Verify a user's own loop on plain Accelerate, and name its fault.

    def update(accelerator, model, optimizer, scheduler, batches): ...
        # one optimizer update from this process's batches

The loop runs on windows that tell faults apart (`loop_windows`). `loop_runner` observes the
gradient of each update and how it moved the weights. `loop_judge` compares the gradient with one
big batch in float64 and, if it differs, with the gradients that known faults (`loop_faults`) give
on the same micro-batches. `loop_update` compares the weights with start - lr * gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.engine.base import Engine
from accum_trainer.engine.build import choose_precision
from accum_trainer.errors import ConfigError, DataError
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.train.rows import load_rows
from accum_trainer.verify.big_batch import Row, dropout_off, num_targets
from accum_trainer.verify.loop_file import Loop
from accum_trainer.verify.loop_judge import LoopJudge
from accum_trainer.verify.loop_runner import LoopRunner
from accum_trainer.verify.loop_windows import SHORT, repeated, windows_for
from accum_trainer.verify.plain_accelerate import plain_engine
from accum_trainer.verify.report import FAIL, INFO, Check, Report
from accum_trainer.verify.shared_checks import dropout_check
from accum_trainer.verify.tolerance import LOW_PRECISION_WINDOWS


def verify_loop_of(config: TrainConfig, loop: Loop, world_size: int) -> Report:
    """Check `loop` with the model, data, sizes and precision of a configuration.

    Raises:
        ConfigError: options that a loop cannot be checked with, such as K = 1, with which nothing
            accumulates; or another source sets another K.
    """
    plan, precision = _check_options(config, world_size)
    engine = plain_engine(plan.gradient_accumulation_steps, config.cpu, precision)
    tokenizer = engine.main_first(load_tokenizer, config)
    rows = engine.main_first(load_rows, config, tokenizer)[0]

    # The reference runs in float64 on a CPU, which some attention kernels cannot.
    reference = dataclasses.replace(config, attention=None)

    def make_model(config: TrainConfig = config) -> torch.nn.Module:
        torch.manual_seed(config.seed)
        return load_model(config, tokenizer)

    return verify_loop(
        loop,
        engine,
        make_model,
        _choose(rows, plan.global_batch_size * 3, config.seed),
        plan,
        config.max_grad_norm,
        make_reference=lambda: make_model(reference),
    )


def verify_loop(
    loop: Loop,
    engine: Engine,
    make_model: Callable[[], torch.nn.Module],
    rows: Sequence[Row],
    plan: BatchPlan,
    max_grad_norm: float | None = None,
    make_reference: Callable[[], torch.nn.Module] | None = None,
) -> Report:
    """Run `loop` on windows made of `rows` and name its faults. Collective; every rank gets the
    same report.

    Args:
        engine: from `plain_engine(K, ...)`.
        make_model: the plain model in float32, with the same weights on every call.
        rows: samples with targets, of different lengths; used again if they are few.
        max_grad_norm: a loop that clips must clip to this, once.
        make_reference: the same model, able to run in float64 on a CPU. Default: `make_model`.

    Raises:
        DataError: no row has a target.
        LoopError: the loop raised.
    """
    if not any(map(num_targets, rows)):
        raise DataError(
            f"none of the {len(rows)} samples has a target; there is nothing to compare"
        )
    judge = None
    if engine.is_main:
        judge = LoopJudge(engine, make_reference or make_model, plan, max_grad_norm)
    separable = engine.gather_objects(judge.separability(rows) if judge is not None else None)[0]
    subject = _describe(loop, engine, plan, max_grad_norm)
    in_force = (
        f"plain Accelerate, {engine.name} on {engine.device.type}, precision "
        f"{engine.mixed_precision}, {plan.describe()}"
    )
    first = [Check("engine in force", INFO, in_force), separable]
    if separable.result == FAIL:
        return Report(subject, first)  # no update can be right, so there is none to judge
    runner = LoopRunner(loop, engine, make_model())
    variants = 1 if engine.mixed_precision == "no" else LOW_PRECISION_WINDOWS
    with dropout_off(runner.model) as dropouts:
        windows = [
            window for variant in range(variants) for window in windows_for(rows, plan, variant)
        ]
        observed = [runner.run(window) for window in [*windows, *repeated(windows)]]
    checks = engine.gather_objects(judge.checks(observed) if judge is not None else None)[0]
    return Report(subject, [*first, *checks, dropout_check(dropouts)])


def _check_options(config: TrainConfig, world_size: int) -> tuple[BatchPlan, str]:
    """The plan and the precision, or a ConfigError for options that a loop has no use for."""
    if isinstance(config.batch_size, str):
        raise ConfigError(
            f"batch_size={config.batch_size} is for `train`; give the micro-batch of your loop as "
            "a number"
        )
    plan = BatchPlan(
        config.batch_size, config.gradient_accumulation_steps, world_size, config.global_batch_size
    )
    if plan.gradient_accumulation_steps == 1:
        raise ConfigError(
            "gradient_accumulation_steps=1 accumulates nothing, so every loop would pass; "
            "give --gradient-accumulation-steps the K of your loop, 2 or more"
        )
    if config.compile:
        raise ConfigError(
            "compile=true is an option of train; a loop gets the plain model: leave it out, and "
            "compile in the loop"
        )
    precision = choose_precision(config.mixed_precision, config.amp, config.cpu)
    if precision == "fp16":
        raise ConfigError(
            "mixed_precision=fp16 skips updates until its loss scale is low enough, so a single "
            "update cannot be judged; check the loop with mixed_precision=no or bf16"
        )
    return plan, precision


def _choose(rows: TokenizedRows, needed: int, seed: int) -> list[Row]:
    """Up to `needed` rows with targets, short ones if there are enough, and after them the longest
    rows: one for each variant of the windows."""
    has_targets = rows.num_targets > 0
    short = np.flatnonzero(has_targets & (rows.lengths <= SHORT))
    positions = short if len(short) >= needed else np.flatnonzero(has_targets)
    chosen = np.random.RandomState(seed).permutation(positions)[:needed].tolist()
    with_targets = np.flatnonzero(has_targets)
    longest = with_targets[np.argsort(rows.lengths[with_targets], kind="stable")]
    chosen += [i for i in longest[-LOW_PRECISION_WINDOWS:].tolist() if i not in chosen]
    return [rows[i] for i in chosen]


def _describe(
    loop: Loop, engine: Engine, plan: BatchPlan, max_grad_norm: float | None
) -> dict[str, Any]:
    return {
        "mode": "loop",
        "loop": f"{loop.__module__}.{getattr(loop, '__name__', loop)}",
        "engine": engine.name,
        "device": engine.device.type,
        "mixed_precision": engine.mixed_precision,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "world_size": plan.world_size,
        "max_grad_norm": max_grad_norm,
        "torch": torch.__version__,
    }
