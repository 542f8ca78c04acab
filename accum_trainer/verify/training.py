"""Verify a training: run some of its real windows and compare each with one float64 big batch.

`_Session` runs windows through the training's own accumulator, model and optimizer, and measures.
Tolerances and the wording of the report are in `tolerance` and `training_checks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accum_trainer import Accumulator, Update, Windows
from accum_trainer.engine.base import Engine
from accum_trainer.errors import DataError
from accum_trainer.lm.model import load_model
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.train.setup import Training
from accum_trainer.verify.big_batch import (
    BigBatch,
    Gradient,
    Row,
    clip_factor,
    dropout_off,
    norm_of,
    num_targets,
    relative_error,
    worst_parameter,
)
from accum_trainer.verify.report import Check, Report
from accum_trainer.verify.shared_checks import dropout_check, separability_check, unequal_names
from accum_trainer.verify.tolerance import LOW_PRECISION_WINDOWS, low_precision_peer, peer_errors
from accum_trainer.verify.training_checks import Measurement, engine_check, training_checks
from accum_trainer.window_plan import global_order


@dataclass(frozen=True)
class Subject:
    """The training to verify: its prepared objects, and a way to make the plain model again.

    Attributes:
        rows: all samples; `rows[i]` has `input_ids` and `labels`. `windows` cuts them in the global
            order of `seed`.
        make_plain: returns the unprepared model in float32; its weights do not matter.
    """

    accumulator: Accumulator
    model: torch.nn.Module
    optimizer: Any
    windows: Windows
    rows: Any
    make_plain: Callable[[], torch.nn.Module]
    seed: int = 0

    @classmethod
    def of(cls, training: Training) -> Subject:
        """The subject that `assemble(config)` made. The reference model has no gradient
        checkpointing and no attention that needs a GPU."""
        plain = dataclasses.replace(
            training.config, gradient_checkpointing=False, activation_offload=False, attention=None
        )
        return cls(
            accumulator=training.accumulator,
            model=training.model,
            optimizer=training.optimizer,
            windows=training.windows,
            rows=training.rows,
            make_plain=lambda: load_model(plain, training.tokenizer),
            seed=training.config.seed,
        )


def verify(subject: Subject, windows: int = 3) -> Report:
    """Run up to `windows` whole windows of the first epoch, and its tail, and compare each with one
    big batch.

    In 16 bits at least LOW_PRECISION_WINDOWS of each run, from as many epochs as that takes.

    Collective: every rank calls, every rank gets the same report. The updates change the model's
    weights.

    Raises:
        DataError: no window has a target.
    """
    with dropout_off(subject.model) as dropouts:
        session = _Session(subject)
        found = [
            session.measure(epoch, start, rows) for epoch, start, rows in session.chosen(windows)
        ]
        separable = session.separability()
    if not found:
        raise DataError(
            f"none of the {len(subject.rows)} samples has a target; there is nothing to compare"
        )
    checks = [
        engine_check(subject.accumulator),
        *training_checks(found, subject.accumulator, len(subject.rows)),
        separable,
        dropout_check(dropouts),
    ]
    return Report(_describe(subject, len(found)), checks)


class _Session:
    """Runs windows of a subject; rank 0 holds the plain models that they are compared with."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._accumulator = subject, subject.accumulator
        self._engine: Engine = subject.accumulator.engine
        self._accumulator.losses.allow_batch_norm = True  # the separability check names BatchNorm
        self._exact: BigBatch | None = None
        self._peer: BigBatch | None = None
        if self._engine.is_main:
            self._exact = BigBatch(subject.make_plain())
            self._peer = low_precision_peer(self._engine, subject.make_plain)
        self._exchanges = _count_exchanges(subject.model)
        self._first_rows: list[Row] = []

    def chosen(self, windows: int) -> Iterator[tuple[int, int, list[Row]]]:
        """(epoch, samples consumed before it, rows) of each window to run: the first whole ones
        with targets, and tails."""
        size, batch = len(self._subject.rows), self._accumulator.plan.global_batch_size
        is_low = self._engine.mixed_precision != "no"
        wanted = max(windows, LOW_PRECISION_WINDOWS) if is_low else windows
        wholes = 0
        for epoch in range(wanted if is_low else 1):
            order = global_order(size, self._subject.seed, epoch)
            for start in range(0, size, batch):
                is_tail = start + batch > size
                if not is_tail and wholes >= wanted:
                    continue
                rows = [self._subject.rows[int(i)] for i in order[start : start + batch]]
                if any(map(num_targets, rows)):
                    wholes += not is_tail
                    self._first_rows = self._first_rows or rows
                    yield epoch, start, rows

    def separability(self) -> Check:
        check = None
        if self._exact is not None:
            check = separability_check(self._exact, self._first_rows)
        return self._engine.gather_objects(check)[0]

    def measure(self, epoch: int, start: int, rows: list[Row]) -> Measurement:
        """Run the window that begins after `start` samples of an epoch; the same result on all
        ranks."""
        engine, model = self._engine, self._subject.model
        weights = {name: w.clone() for name, w in engine.full_weights(model).items()}
        gradient, update, given_norm, exchanges = self._run(epoch, start)
        unequal = unequal_names(engine, engine.full_weights(model))
        if self._exact is None:
            return engine.gather_objects(None)[0]
        self._exact.load(weights)
        truth = self._exact.truth(rows)
        exact = truth.mean_gradient
        peer_error, peer_loss_error = peer_errors(self._peer, weights, rows, truth)
        norm = norm_of(exact)
        clipped = norm * clip_factor(norm, self._accumulator.max_grad_norm)
        syncs_each = engine.grad_sync == "every-microbatch"
        measurement = Measurement(
            is_tail=len(rows) < self._accumulator.plan.global_batch_size,
            num_samples=update.num_samples,
            error=relative_error(gradient, exact),
            peer_error=peer_error,
            worst=worst_parameter(gradient, exact),
            loss_error=abs(update.loss - truth.loss) / truth.loss,
            peer_loss_error=peer_loss_error,
            norm=norm,
            norm_error=max(
                abs(update.grad_norm - norm) / norm, abs(given_norm - clipped) / clipped
            ),
            exchanges=exchanges,
            expected_exchanges=update.gradient_accumulation_steps if syncs_each else 1,
            unequal=unequal,
        )
        return engine.gather_objects(measurement)[0]

    def _run(self, epoch: int, start: int) -> tuple[Gradient, Update, float, int]:
        """The real loop over one window: (averaged gradient, update, norm of the gradient given to
        the optimizer, exchanges)."""
        subject, accumulator = self._subject, self._accumulator
        while True:
            subject.windows.load_state_dict({"epoch": epoch, "samples_consumed": start})
            before = self._exchanges[0]
            window = next(iter(subject.windows))
            for batch in window:
                with accumulator.accumulate(subject.model):
                    accumulator.backward(causal_lm_loss(subject.model, batch))
            gradient = {
                name: g.double().cpu()
                for name, g in self._engine.full_gradients(subject.model).items()
            }
            with _squares_given_to(subject.optimizer) as squares:
                update = accumulator.step(subject.optimizer)
            # A skipped update in fp16 halves the loss scale; try again.
            if not (update.skipped and self._engine.mixed_precision == "fp16"):
                break
        by_rank = self._engine.all_gather_floats([sum(squares)])[:, 0]
        is_sharded = self._engine.shards_optimizer
        given_norm = math.sqrt(float(by_rank.sum() if is_sharded else by_rank[0]))
        return gradient, update, given_norm, self._exchanges[0] - before


def _count_exchanges(model: torch.nn.Module) -> list[int]:
    """A list whose only number counts DDP's gradient exchanges from now on; it stays 0 without
    DDP."""
    counted = [0]
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(group: Any, bucket: Any) -> Any:
            counted[0] += bucket.is_last()
            return allreduce_hook(group, bucket)

        hook.__annotations__ = {}  # DDP compares annotations with classes; ours are text
        with contextlib.suppress(RuntimeError):  # the user has registered a hook already
            model.register_comm_hook(None, hook)
    return counted


@contextlib.contextmanager
def _squares_given_to(optimizer: Any) -> Iterator[list[float]]:
    """Collect the sum of squares of each gradient (this rank's shards) that the innermost torch
    optimizer is given at a step."""
    squares: list[float] = []

    def note(inner: torch.optim.Optimizer, *_: Any) -> None:
        for group in inner.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                    squares.append(float((gradient.double() ** 2).sum()))

    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    handle = inner.register_step_pre_hook(note)
    try:
        yield squares
    finally:
        handle.remove()


def _describe(subject: Subject, windows: int) -> dict[str, Any]:
    engine, plan = subject.accumulator.engine, subject.accumulator.plan
    return {
        "mode": "training",
        "engine": engine.name,
        "device": engine.device.type,
        "mixed_precision": engine.mixed_precision,
        "grad_sync": engine.grad_sync,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch_size,
        "max_grad_norm": subject.accumulator.max_grad_norm,
        "windows": windows,
        "seed": subject.seed,
        "num_samples": len(subject.rows),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
