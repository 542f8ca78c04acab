"""Which fault a training step has: a user's own loop on plain Accelerate, against one big batch in
float64.

    def update(accelerator, model, optimizer, scheduler, batches): ...
        # one optimizer update from this process's batches

The loop is given windows that tell faults apart: ragged micro-batches, a micro-batch without a
target, ranks that hold very different numbers of targets, a tail with fewer micro-batches than K,
rows with a first label and rows without. The gradient that its optimizer steps with is compared
with the right one; where it differs, with what each known fault would make of the same
micro-batches. The nearest names the fault, and the weights that the loop gave its micro-batches are
found by least squares and shown.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accum_trainer.batch import IGNORE
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.engine.base import Engine
from accum_trainer.engine.build import choose_precision
from accum_trainer.engine.plain import MicroBatches, plain_engine, start_update
from accum_trainer.errors import ConfigError, DataError, LoopError
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.train.rows import load_rows
from accum_trainer.verify.big_batch import (
    BigBatch,
    Gradient,
    Row,
    clip_factor,
    dropout_off,
    num_targets,
    pad,
)
from accum_trainer.verify.loop_faults import RIGHT, TAIL, Fault, MicroBatchGradients, Vector, flat
from accum_trainer.verify.report import FAIL, INFO, PASS, Check, Report, measured
from accum_trainer.verify.training import (
    LOW_PRECISION_WINDOWS,
    dropout_check,
    judged,
    low_precision_peer,
    own_errors,
    separability,
    unequal_names,
    window_lines,
)

Loop = Callable[[Any, torch.nn.Module, Any, Any, list[Any]], Any]

# A found gradient this near to a known fault's is that fault; in low precision also one within this
# many times of what one big batch is off, since a single window's rounding may be worse than that.
_MATCH, _MATCH_ROUNDED = 1e-3, 2.0
_LR = 0.1
# What a loop is called with.
_PARAMETERS = ("accelerator", "model", "optimizer", "scheduler", "batches")
# Rows of the user's data longer than this are left out where enough are shorter: the check is about
# weights, not length.
_SHORT = 96

# --- the command's entry ---


def load_loop(spec: str) -> Loop:
    """The function named by `FILE.py:function`; ConfigError where there is none."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path or not name:
        raise ConfigError(f"loop={spec} does not name a function; give FILE.py:function")
    if not Path(path).is_file():
        raise ConfigError(f"loop={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("loop_to_verify", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"loop={spec}: {path} is not a Python file; give FILE.py:function")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(
        0, str(Path(path).resolve().parent)
    )  # as `python FILE.py` would, for what it imports
    try:
        module_spec.loader.exec_module(module)
    # the user's own file may raise anything; it should define the function and do no more
    except Exception as error:
        raise ConfigError(
            f"loop={spec}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    loop = getattr(module, name, None)
    if not callable(loop):
        there = sorted(
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        )
        raise ConfigError(
            f"loop={spec}: {path} has no function {name}; it has {', '.join(there) or 'none'}"
        )
    _check_parameters(spec, name, loop)
    return loop


def _check_parameters(spec: str, name: str, loop: Loop) -> None:
    """Refuse a function that cannot be called with the five objects, or that expects them in
    another order."""
    try:
        signature = inspect.signature(loop)
    except ValueError:  # a callable written in C does not say
        return
    called = f"({', '.join(_PARAMETERS)})"
    try:
        signature.bind(*_PARAMETERS)
    except TypeError as wrong:
        raise ConfigError(
            f"loop={spec}: {name}{signature} cannot be called with {called}: {wrong}; give it "
            "these five parameters"
        ) from None
    for place, (parameter, given) in enumerate(
        zip(signature.parameters, _PARAMETERS, strict=False), start=1
    ):
        if parameter != given and parameter in _PARAMETERS:
            raise ConfigError(
                f"loop={spec}: {name}{signature} is called with {called}: its parameter {place} is "
                f"{parameter}, and "
                f"{place} is given {given}; put them in this order"
            )


def verify_loop_of(config: TrainConfig, loop: Loop, world_size: int) -> Report:
    """Check `loop` with the model, data, sizes and precision of a configuration.

    Raises:
        ConfigError: K is 1, so that nothing accumulates; or another source says another K.
    """
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
            "compile=true is what train does to its model; a loop is given the model as it is: "
            "leave it out, and compile in the loop"
        )
    precision = choose_precision(config.mixed_precision, config.amp, config.cpu)
    if precision == "fp16":
        raise ConfigError(
            "mixed_precision=fp16 skips updates until its loss scale fits, so a single update "
            "cannot be judged; "
            "check the loop with mixed_precision=no or bf16"
        )
    engine = plain_engine(plan.gradient_accumulation_steps, config.cpu, precision)
    tokenizer = engine.main_first(load_tokenizer, config)
    rows = engine.main_first(load_rows, config, tokenizer)[0]
    short = [int(i) for i in np.flatnonzero((rows.lengths <= _SHORT) & (rows.num_targets > 0))]
    needed = plan.global_batch_size * 3
    positions = (
        short if len(short) >= needed else [int(i) for i in np.flatnonzero(rows.num_targets > 0)]
    )
    chosen = np.random.RandomState(config.seed).permutation(positions)[:needed]

    # The reference runs on a CPU in float64, where not every attention does.
    reference = dataclasses.replace(config, attention=None)

    def make_model(config: TrainConfig = config) -> torch.nn.Module:
        torch.manual_seed(config.seed)
        return load_model(config, tokenizer)

    return verify_loop(
        loop,
        engine,
        make_model,
        [rows[int(i)] for i in chosen],
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
    """Run `loop` on windows made of `rows` and say what it computes. Collective; every rank gets
    the same report.

    Args:
        engine: from `plain_engine(K, ...)`.
        make_model: the plain model in float32, with the same weights on every call.
        rows: samples with targets, of different lengths; used again and again where they are few.
        max_grad_norm: a loop that clips must clip to this, once.
        make_reference: the same model as float64 on a CPU can run it. Default: `make_model`.
    """
    if not any(map(num_targets, rows)):
        raise DataError(
            f"none of the {len(rows)} samples has a target; there is nothing to compare"
        )
    judge = (
        _Judge(engine, make_reference or make_model, plan, max_grad_norm)
        if engine.is_main
        else None
    )
    separable = engine.gather_objects(judge.separability(rows) if judge is not None else None)[0]
    subject = {
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
    in_force = (
        f"plain Accelerate, {engine.name} on {engine.device.type}, precision "
        f"{engine.mixed_precision}, {plan.describe()}"
    )
    first = [Check("engine in force", INFO, in_force), separable]
    if separable.result == FAIL:
        return Report(subject, first)  # no update can be right, so there is none to judge
    runner = _Runner(loop, engine, make_model())
    with dropout_off(runner.model) as dropouts:
        variants = 1 if engine.mixed_precision == "no" else LOW_PRECISION_WINDOWS
        seen = [
            runner.run(window)
            for variant in range(variants)
            for window in windows_for(rows, plan, variant)
        ]
    checks = judge.checks(seen) if judge is not None else None
    return Report(subject, [*first, *engine.gather_objects(checks)[0], dropout_check(dropouts)])


# --- windows ---


@dataclass(frozen=True)
class LoopWindow:
    """One update's rows, cut: `ranks[rank][step]` is a micro-batch."""

    name: str
    ranks: list[list[list[Row]]]


def windows_for(rows: Sequence[Row], plan: BatchPlan, variant: int = 0) -> list[LoopWindow]:
    """The windows that tell faults apart, the same on all ranks; other rows for another
    `variant`."""
    batch, steps, ranks = plan.micro_batch_size, plan.gradient_accumulation_steps, plan.world_size
    shortest_first = sorted(rows, key=num_targets)

    def take(count: int) -> list[Row]:
        """`count` rows from the shortest to the longest, evenly."""
        last = len(rows) - 1
        return [
            shortest_first[min(int(i) + variant, last)] for i in np.linspace(0, last, count).round()
        ]

    def cut(chosen: list[Row], num_steps: int) -> list[list[Row]]:
        return [chosen[k * batch : (k + 1) * batch] for k in range(num_steps)]

    whole, size = take(batch * steps * ranks), batch * steps
    ragged = [cut(whole[r::ranks], steps) for r in range(ranks)]
    windows = [LoopWindow("ragged window", ragged)]
    if ranks > 1:
        uneven = [cut(whole[r * size : (r + 1) * size], steps) for r in range(ranks)]
        windows.append(LoopWindow("uneven ranks", uneven))
    fewer = max(
        1, min(steps - 1, steps // 2 + 1)
    )  # not 1 where it can be more: m / K and 1 / K would look alike
    tail = take(batch * fewer * ranks)
    tails = [cut(tail[r::ranks], fewer) for r in range(ranks)]
    tails[0][-1] = tails[0][-1][-1:]
    windows.append(LoopWindow("tail window", tails))
    masked: list[Row] = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in ragged[0][0]]
    empty = [[masked, *ragged[0][1:]], *ragged[1:]]
    marked = [LoopWindow(window.name, _with_first_labels(window.ranks)) for window in windows]
    # Its first micro-batch has no label at all, so that the mean of the model's own loss is 0/0
    # there.
    return [
        *marked,
        LoopWindow("a micro-batch without a target", _with_first_labels(empty, begin=1)),
    ]


def _with_first_labels(ranks: list[list[list[Row]]], begin: int = 0) -> list[list[list[Row]]]:
    """Give rows of every other micro-batch (from `begin`), on every other rank, a first label; take
    it from all others.

    The shift drops a row's first label, so this changes no target and no loss. A loop that counts
    it shows only where micro-batches and ranks have different numbers of them: data whose prompts
    are masked have none at all.
    """

    def first(row: Row, is_counted: bool) -> Row:
        return {
            **row,
            "labels": [row["input_ids"][0] if is_counted else IGNORE, *row["labels"][1:]],
        }

    return [
        [
            [first(row, r % 2 == 0 and k >= begin and (k - begin) % 2 == 0) for row in rows]
            for k, rows in enumerate(rank)
        ]
        for r, rank in enumerate(ranks)
    ]


# --- running the loop ---


@dataclass(frozen=True)
class _Seen:
    """What one call of the loop did, on rank 0.

    Attributes:
        start: weights before it.
        gradient: what the optimizer stepped with, the mean of the ranks' where they differ; None
            where it did not step.
        unequal: parameters whose weights differ between ranks after it.
        optimizer_steps, scheduler_steps: how often each stepped.
        leftover: what was left in the parameters' gradients before it.
    """

    window: LoopWindow
    start: Mapping[str, torch.Tensor]
    gradient: Gradient | None
    unequal: list[str]
    optimizer_steps: int
    scheduler_steps: int
    leftover: Gradient


class _Runner:
    """Calls the loop on prepared objects, every time from the same weights."""

    def __init__(self, loop: Loop, engine: Engine, model: torch.nn.Module) -> None:
        self._loop, self._engine = loop, engine
        self._sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=_LR)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._sgd, lambda update: 0.9**update)
        prepared = engine.accelerator.prepare(model, self._sgd, self._schedule)
        self.model, self._optimizer, self._scheduler = prepared
        self._start = {n: w.clone() for n, w in engine.full_weights(self.model).items()}

    def run(self, window: LoopWindow) -> _Seen:
        engine = self._engine
        engine.load_full_weights(self.model, self._start)
        leftover = self._gradients()
        stepped: list[Gradient] = []
        handle = self._sgd.register_step_pre_hook(lambda *_: stepped.append(self._gradients()))
        before = self._schedule.last_epoch
        start_update(engine)
        batches = [engine.to_device(pad(rows)) for rows in window.ranks[engine.rank]]
        try:
            self._loop(
                engine.accelerator,
                self.model,
                self._optimizer,
                self._scheduler,
                MicroBatches(engine, batches),
            )
        except Exception as error:  # the user's own code may raise anything
            raise LoopError(_words(error, self._loop, window.name)) from error
        finally:
            handle.remove()
        return _Seen(
            window=window,
            start=self._start,
            gradient=self._mean_over_ranks(stepped[-1]) if stepped else None,
            unequal=unequal_names(engine, engine.full_weights(self.model)),
            optimizer_steps=len(stepped),
            scheduler_steps=self._schedule.last_epoch - before,
            leftover=leftover,
        )

    def _gradients(self) -> Gradient:
        named = self._engine.unwrap(self.model).named_parameters()
        return {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None}

    def _mean_over_ranks(self, gradient: Gradient) -> Gradient:
        """Equal on all ranks as it should be, or else their mean: what a parameter left out would
        have been."""
        if not unequal_names(self._engine, gradient):
            return gradient
        ranks = self._engine.gather_objects(gradient)
        names = {name for rank in ranks for name in rank}
        return {
            n: torch.stack(
                [
                    rank.get(n, torch.zeros_like(next(r[n] for r in ranks if n in r)))
                    for rank in ranks
                ]
            ).mean(0)
            for n in names
        }


def _words(error: Exception, loop: Loop, window: str) -> str:
    """Where in the loop's own file an exception came from, and what it says."""
    file = getattr(getattr(loop, "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or frames
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return (
        f"the loop raised in its {window}, at {own[-1].filename}:{own[-1].lineno}: "
        f"{type(error).__name__}: {said or 'without words'}; a loop must make one update of any "
        "window"
    )


# --- judging it, on rank 0 ---


@dataclass(frozen=True)
class _Judged:
    """The verdict on windows of one kind: right where `error` is within `tolerance`; else `fits`
    are the faults, or sets of them, that would look like it, and `meaning` is what can be said
    without."""

    name: str
    meaning: str
    error: float | None = None
    tolerance: float | None = None
    fits: Sequence[tuple[Fault, ...]] = ()
    details: tuple[str, ...] = ()

    def check(self, certain: set[Fault]) -> Check:
        """The report's row; `certain` are faults that another window has shown beyond doubt."""
        if self.error is not None and self.tolerance is not None and self.error <= self.tolerance:
            return measured(
                self.name, self.error, self.tolerance, self.meaning, details=self.details
            )
        if not self.fits:
            return Check(self.name, FAIL, self.meaning, self.error, self.tolerance, self.details)
        known = max(len(certain & set(faults)) for faults in self.fits)
        named = [faults for faults in self.fits if len(certain & set(faults)) == known]
        # What would have shown in whole windows too, and did not, is not what is wrong with the
        # tail.
        named = [faults for faults in named if TAIL in faults and not known] or named
        meaning = "; or ".join(" AND ".join(fault.sentence for fault in faults) for faults in named)
        formulas = tuple(f"loop:  {fault.formula}" for faults in named for fault in faults)
        return Check(
            self.name, FAIL, meaning, self.error, self.tolerance, (RIGHT, *formulas, *self.details)
        )


@dataclass(frozen=True)
class _Found:
    """One window's gradient beside the right one; `error` is relative, nan where the gradient is
    not finite."""

    gradient: Vector
    right: Vector
    parts: MicroBatchGradients
    error: float
    own_error: float | None


class _Judge:
    """Compares what the loop did with the definition, and names the fault."""

    def __init__(
        self,
        engine: Engine,
        make_model: Callable[[], torch.nn.Module],
        plan: BatchPlan,
        max_grad_norm: float | None,
    ) -> None:
        self._exact, self._peer = BigBatch(make_model()), low_precision_peer(engine, make_model)
        self._precision = engine.mixed_precision
        self._names = {
            n: p.numel() for n, p in self._exact.model.named_parameters() if p.requires_grad
        }
        self._plan, self._max_grad_norm = plan, max_grad_norm

    def separability(self, rows: Sequence[Row]) -> Check:
        return separability(self._exact, rows)

    def checks(self, seen: list[_Seen]) -> list[Check]:
        names = dict.fromkeys(one.window.name for one in seen)
        updates = [self._update([one for one in seen if one.window.name == name]) for name in names]
        # Where several faults fit a window, another window may have told which it is.
        certain = {fault for u in updates if len(u.fits) == 1 for fault in u.fits[0]}
        return [
            *(u.check(certain) for u in updates),
            _ranks_check(seen),
            _steps_check(seen),
            _scheduler_check(seen),
        ]

    def _update(self, seen: list[_Seen]) -> _Judged:
        """Windows of one kind: are the gradients of their updates the big batch's, and if not, what
        is the worst of them?"""
        name = seen[0].window.name
        found = []
        for one in seen:
            if one.gradient is None or one.optimizer_steps > 1:
                return _Judged(
                    name,
                    "the function must make one update, and the optimizer stepped "
                    f"{one.optimizer_steps} times",
                )
            found.append(self._against_right(one, flat(one.gradient, self._names)))
            if not math.isfinite(found[-1].error):
                empty = any(0 in rank for rank in found[-1].parts.targets)
                why = (
                    "a mean over no target is 0/0; use the sum of the losses"
                    if empty
                    else "the loop divides by 0 or overflows"
                )
                return _Judged(
                    name, f"the gradient is not finite: {why}", math.inf, details=(RIGHT,)
                )
        errors, own = [one.error for one in found], [one.own_error for one in found]
        error, tolerance = judged(errors, own)
        lines = window_lines(errors, own, self._precision)
        if error <= tolerance:
            return _Judged(
                name,
                self._describe_right(found[0].gradient, found[0].right),
                error,
                tolerance,
                (),
                lines,
            )
        worst = max(range(len(seen)), key=lambda i: errors[i] / (own[i] or 1.0))
        off, leftover = found[worst], flat(seen[worst].leftover, self._names)
        fits = self._fits(
            off.gradient, off.parts, leftover, max(_MATCH, _MATCH_ROUNDED * (off.own_error or 0.0))
        )
        unknown = self._unknown(off.gradient, off.right, off.error)
        return _Judged(
            name,
            unknown,
            error,
            tolerance,
            fits,
            (*_weights_found(off.gradient, off.parts), *lines),
        )

    def _against_right(self, seen: _Seen, gradient: Vector) -> _Found:
        parts = MicroBatchGradients(
            self._exact, self._names, seen.window.ranks, self._plan.gradient_accumulation_steps
        )
        right = parts.combine(parts.right)
        rows = [row for rank in seen.window.ranks for batch in rank for row in batch]
        own_error, _ = own_errors(self._peer, seen.start, rows, self._exact.truth(rows))
        error = self._distance(gradient, right) if torch.isfinite(gradient).all() else math.nan
        return _Found(gradient, right, parts, error, own_error)

    def _distance(self, found: Vector, candidate: Vector) -> float:
        """Relative difference, to the candidate as it is or clipped once: whether a loop clips is
        its own choice."""
        norm = float(candidate.norm()) or 1.0
        factor = clip_factor(norm, self._max_grad_norm)
        plain = float((found - candidate).norm()) / norm
        return min(plain, float((found - factor * candidate).norm()) / (factor * norm))

    def _describe_right(self, found: Vector, right: Vector) -> str:
        clipped = float(found.norm()) < 0.999 * float(right.norm())
        return (
            "the big batch's "
            f"gradient{f', clipped once to {self._max_grad_norm:g}' if clipped else ''}"
        )

    def _fits(
        self, found: Vector, parts: MicroBatchGradients, leftover: Vector, limit: float
    ) -> list[tuple[Fault, ...]]:
        """The faults that give this gradient, within `limit`: the nearest, and those as simple that
        look alike here."""
        candidates = parts.candidates(leftover, self._max_grad_norm)
        distances = [(self._distance(found, vector), faults) for faults, vector in candidates]
        nearest = min(distance for distance, _ in distances)
        if nearest > limit:
            return []
        alike = [faults for distance, faults in distances if distance <= 1.5 * nearest + 1e-7]
        return [faults for faults in alike if len(faults) == min(map(len, alike))]

    def _unknown(self, found: Vector, right: Vector, error: float) -> str:
        """What can be said of a gradient that no known fault gives."""
        cosine = float(found @ right / (found.norm() * right.norm())) if found.any() else 0.0
        if cosine > 1 - 1e-6:
            length = f"{float(found.norm() / right.norm()):.4g} times the right length"
            norm = (
                f"its norm is {float(found.norm()):.4g}; a loop may clip to "
                f"max_grad_norm={self._max_grad_norm} and nothing else"
            )
            return f"the gradient has the right direction but {length} ({norm})"
        if 1e-4 < error < 1e-1 and cosine > 0.99:
            return (
                f"none of the known faults, but {error:.1e} off, as where something is kept or "
                "added up in low precision"
            )
        return (
            f"none of the known faults: the gradient is {error:.2g} off (cosine {cosine:.4f}); "
            "does the loss compare the rows "
            "of a micro-batch with each other, weigh its targets, or leave some out?"
        )


def _weights_found(found: Vector, parts: MicroBatchGradients) -> tuple[str, ...]:
    """Lines with the weight that the loop gave each micro-batch's summed loss, in units of the
    right 1/N."""
    places = [(r, k) for r, rank in enumerate(parts.targets) for k, n in enumerate(rank) if n > 0]
    columns = torch.stack([parts.gradients[r][k] for r, k in places])
    fitted = torch.linalg.pinv(columns @ columns.T, hermitian=True) @ (columns @ found)
    left = float((fitted @ columns - found).norm() / (found.norm() or 1.0))
    if left > 1e-2:
        return (
            f"loop:  no weighted sum of the micro-batches' gradients ({left:.0%} of it is "
            "something else)",
        )
    return tuple(
        f"  rank {r} micro-batch {k}: {parts.targets[r][k]:5} targets, weight found "
        f"{w * parts.num_targets:8.4f} / N, right 1 / N"
        for (r, k), w in zip(places, fitted.tolist(), strict=True)
    )


def _ranks_check(seen: list[_Seen]) -> Check:
    name, ranks = "equal weights", len(seen[0].window.ranks)
    if ranks == 1:
        return Check(name, INFO, "one rank only")
    unequal = sorted({parameter for one in seen for parameter in one.unequal})
    if not unequal:
        return Check(
            name, PASS, f"all weights are equal to the bit on {ranks} ranks after each update"
        )
    names = ", ".join(unequal[:3]) + (f" and {len(unequal) - 3} more" if len(unequal) > 3 else "")
    meaning = (
        f"left out of the exchange: after an update the ranks hold different weights of {names}"
    )
    how = (
        "right:  the last backward of a window runs through the model that prepare() returned, "
        "outside no_sync"
    )
    return Check(
        name,
        FAIL,
        meaning,
        details=(how, "loop:  gradients of these parameters stay each rank's own"),
    )


def _steps_check(seen: list[_Seen]) -> Check:
    name = "one optimizer step"
    wrong = [one for one in seen if one.optimizer_steps != 1]
    if not wrong:
        return Check(name, PASS, "the optimizer steps once per update")
    one = wrong[0]
    meaning = (
        f"the optimizer steps {one.optimizer_steps} times in the {one.window.name}, and "
        "should once per update"
    )
    if one.optimizer_steps == len(one.window.ranks[0]) > 1:
        meaning += ": it steps per micro-batch, so nothing accumulates"
    return Check(name, FAIL, meaning)


def _scheduler_check(seen: list[_Seen]) -> Check:
    name = "scheduler per update"
    total = sum(one.scheduler_steps for one in seen)
    if total == 0:
        return Check(name, INFO, "the function does not step the scheduler")
    if all(one.scheduler_steps == 1 for one in seen):
        return Check(name, PASS, "the scheduler steps once per update")
    one = next(one for one in seen if one.scheduler_steps != 1)
    each = (
        "scheduler stepped per micro-step"
        if one.scheduler_steps == len(one.window.ranks[0])
        else "scheduler stepped"
    )
    meaning = (
        f"{each}: {one.scheduler_steps} times in the {one.window.name}, and should once per update"
    )
    u = len(seen)
    details = (
        f"right:  the learning rate after u updates is schedule(u); after {u} updates "
        f"schedule({u})",
        f"loop:  after {u} updates it is schedule({total})",
    )
    return Check(name, FAIL, meaning, details=details)
