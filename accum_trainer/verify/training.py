"""Checks of a training: its windows against one float64 big batch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Truth,
    clip_factor,
    dropout_off,
    norm_of,
    num_targets,
    relative_error,
    worst_parameter,
)
from accum_trainer.verify.report import FAIL, INFO, PASS, Check, Report, measured
from accum_trainer.window_plan import global_order

# Relative error of a float32 gradient: one float32 big batch is itself 3e-7 to 9e-7 off.
FLOAT32_TOLERANCE = 2e-6
# How much worse than one big batch in the same low precision the windows may be, by root mean
# square over them. Rounding falls differently in every cut. Measured over 4 windows in bf16, whole
# ones and tails: 0.95 to 1.02 on one process, DDP and FSDP2 (26 trainings), 1.00 to 1.09 on ZeRO 1
# to 3 (12), which rounds once more where it adds up the ranks' gradients.
PRECISION_MARGIN, ZERO_PRECISION_MARGIN = 1.1, 1.25
# So many windows of each kind are run in low precision, however few are asked for: single ones were
# measured at up to 1.07 (ZeRO: 1.14).
LOW_PRECISION_WINDOWS = 4
# What a sum of single rows may differ from their batch; models compute some of a float64 forward in
# float32.
SEPARABLE_TOLERANCE = 1e-6
# torch adds up a norm in float32: over a million squares that alone is 1e-5 off. A wrong clip is
# off by far more.
NORM_TOLERANCE = 1e-4
_SEPARABLE_ROWS = 8


def dropout_check(modules: int) -> Check:
    found = f"{modules} modules" if modules else "the model has none"
    return Check("dropout", INFO, f"dropout off for the comparison: {found}")


def separability(exact: BigBatch, rows: Sequence[Row]) -> Check:
    """Whether the gradient of a batch is the sum of its rows' gradients, in float64 and train mode.

    Where it is not, no cut into micro-batches can give the big batch's update, whoever makes it.
    """
    some = [row for row in rows if num_targets(row)][:_SEPARABLE_ROWS]
    if len(some) < 2:
        return Check(
            "separable loss", INFO, "one row with targets only: there is nothing to separate"
        )
    whole, again = exact.truth(some, len(some)), exact.truth(some, len(some))
    random = relative_error(again.gradient, whole.gradient)
    if not random <= SEPARABLE_TOLERANCE:
        meaning = (
            "the model draws random numbers besides dropout, so no two passes agree and "
            "nothing can be compared"
        )
        return Check("separable loss", FAIL, meaning, random, SEPARABLE_TOLERANCE)
    error = relative_error(exact.truth(some, 1).gradient, whole.gradient)
    return measured(
        "separable loss",
        error,
        SEPARABLE_TOLERANCE,
        f"a batch of {len(some)} rows has the sum of its rows' gradients, so it can be cut "
        "anywhere",
        f"not separable: {_coupling(exact.model)}; no cut into micro-batches gives the big batch's "
        "update",
    )


def _coupling(model: torch.nn.Module) -> str:
    """What makes the rows of a batch depend on each other."""
    norms = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ]
    if norms:
        return (
            f"{len(norms)} BatchNorm modules ({', '.join(norms[:3])}) take statistics over the "
            "micro-batch; "
            "use LayerNorm or GroupNorm, or freeze them in eval mode"
        )
    return (
        "the rows of a batch depend on each other (an in-batch loss such as in-batch "
        "negatives, or a batch-wide routing)"
    )


# --- the real loop against it ---


@dataclass(frozen=True)
class Subject:
    """What is verified: the prepared parts of a training, and how to make the plain model again.

    Attributes:
        rows: all samples, `rows[i]` with `input_ids` and `labels`; `windows` were made of them with
            this `seed`.
        make_plain: the unprepared model in float32; its weights do not matter.
    """

    accumulator: Accumulator
    model: torch.nn.Module
    optimizer: Any
    windows: Windows
    rows: Any
    make_plain: Callable[[], torch.nn.Module]
    seed: int = 0

    @classmethod
    def of(cls, parts: Training) -> Subject:
        """The subject that `assemble(config)` made; checkpointing, and attention that needs a GPU,
        are left out of the reference."""
        plain = dataclasses.replace(parts.config, gradient_checkpointing=False, attention=None)
        return cls(
            accumulator=parts.accumulator,
            model=parts.model,
            optimizer=parts.optimizer,
            windows=parts.windows,
            rows=parts.rows,
            make_plain=lambda: load_model(plain, parts.tokenizer),
            seed=parts.config.seed,
        )


@dataclass(frozen=True)
class _Measurement:
    """One window against the truth; errors are relative. `own_error` and `own_loss_error` are those
    of one big batch in the same low precision, None in float32."""

    is_tail: bool
    num_samples: int
    error: float
    own_error: float | None
    worst: str
    loss_error: float
    own_loss_error: float | None
    norm: float
    norm_error: float
    exchanges: int
    expected_exchanges: int
    unequal: list[str]


def verify(subject: Subject, windows: int = 3) -> Report:
    """Run up to `windows` whole windows of the first epoch, and its tail, and compare each with one
    big batch.

    In low precision at least LOW_PRECISION_WINDOWS of each, from as many epochs as that takes.

    Collective: every rank calls, every rank gets the same report. The model's weights are changed
    by the updates.

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
        *_update_checks(found, session),
        *_loop_checks(found, session),
        separable,
        dropout_check(dropouts),
    ]
    return Report(_describe(subject, len(found)), [_engine_check(subject), *checks])


class _Session:
    """Runs windows of a subject; rank 0 keeps the plain models that they are compared with."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.acc = subject, subject.accumulator
        self.engine: Engine = subject.accumulator.engine
        self.acc.losses.allow_batch_norm = True  # it is named here, with the rest
        self.exact: BigBatch | None = None
        self.peer: BigBatch | None = None
        if self.engine.is_main:
            self.exact, self.peer = (
                BigBatch(subject.make_plain()),
                low_precision_peer(self.engine, subject.make_plain),
            )
        self._exchanges = _count_exchanges(subject.model)
        self._first_rows: list[Row] = []

    def chosen(self, windows: int) -> Iterator[tuple[int, int, list[Row]]]:
        """(epoch, samples consumed before it, rows) of each window to run: the first whole ones
        with targets, and tails."""
        size, batch = len(self.subject.rows), self.acc.plan.global_batch_size
        is_low = self.engine.mixed_precision != "no"
        wanted = max(windows, LOW_PRECISION_WINDOWS) if is_low else windows
        wholes = 0
        for epoch in range(wanted if is_low else 1):
            order = global_order(size, self.subject.seed, epoch)
            for start in range(0, size, batch):
                is_tail = start + batch > size
                if not is_tail and wholes >= wanted:
                    continue
                rows = [self.subject.rows[int(i)] for i in order[start : start + batch]]
                if any(map(num_targets, rows)):
                    wholes += not is_tail
                    self._first_rows = self._first_rows or rows
                    yield epoch, start, rows

    def separability(self) -> Check:
        check = separability(self.exact, self._first_rows) if self.exact is not None else None
        return self.engine.gather_objects(check)[0]

    def measure(self, epoch: int, start: int, rows: list[Row]) -> _Measurement:
        """Run the window that begins after `start` samples of an epoch; the same result on all
        ranks."""
        weights = {n: w.clone() for n, w in self.engine.full_weights(self.subject.model).items()}
        gradient, update, given, exchanges = self._run(epoch, start)
        unequal = unequal_names(self.engine, self.engine.full_weights(self.subject.model))
        steps = (
            update.gradient_accumulation_steps if self.engine.grad_sync == "every-microbatch" else 1
        )
        if self.exact is None:
            return self.engine.gather_objects(None)[0]
        self.exact.load(weights)
        truth = self.exact.truth(rows)
        exact = truth.mean_gradient
        own_error, own_loss_error = own_errors(self.peer, weights, rows, truth)
        norm = norm_of(exact)
        expected = norm * clip_factor(norm, self.acc.max_grad_norm)
        measurement = _Measurement(
            is_tail=len(rows) < self.acc.plan.global_batch_size,
            num_samples=update.num_samples,
            error=relative_error(gradient, exact),
            own_error=own_error,
            worst=worst_parameter(gradient, exact),
            loss_error=abs(update.loss - truth.loss) / truth.loss,
            own_loss_error=own_loss_error,
            norm=norm,
            norm_error=max(abs(update.grad_norm - norm) / norm, abs(given - expected) / expected),
            exchanges=exchanges,
            expected_exchanges=steps,
            unequal=unequal,
        )
        return self.engine.gather_objects(measurement)[0]

    def _run(self, epoch: int, start: int) -> tuple[Gradient, Update, float, int]:
        """The real loop over one window: (averaged gradient, update, norm that the optimizer was
        given, exchanges)."""
        subject, acc = self.subject, self.acc
        while True:
            subject.windows.load_state_dict({"epoch": epoch, "samples_consumed": start})
            before = self._exchanges[0]
            window = next(iter(subject.windows))
            for batch in window:
                with acc.accumulate(subject.model):
                    acc.backward(causal_lm_loss(subject.model, batch))
            gradient = {
                n: g.double().cpu() for n, g in self.engine.full_gradients(subject.model).items()
            }
            with _given_to(subject.optimizer) as squares:
                update = acc.step(subject.optimizer)
            if not (
                update.skipped and self.engine.mixed_precision == "fp16"
            ):  # a skip halves fp16's loss scale
                break
        by_rank = self.engine.all_gather_floats([sum(squares)])[:, 0]
        is_sharded = self.engine.name not in ("single", "ddp", "zero0")
        given = math.sqrt(float(by_rank.sum() if is_sharded else by_rank[0]))
        return gradient, update, given, self._exchanges[0] - before


def own_errors(
    peer: BigBatch | None, weights: Mapping[str, torch.Tensor], rows: Sequence[Row], truth: Truth
) -> tuple[float | None, float | None]:
    """What one big batch in `peer` is itself off: (its gradient, its loss), relative; None where
    there is no peer.

    Errors of single rows may cancel in a loss by chance, so the loss's is made of their sizes.
    """
    if peer is None:
        return None, None
    peer.load(weights)
    one = peer.truth_of_one_batch(rows)
    error = relative_error(one.mean_gradient, truth.mean_gradient)
    return error, float((one.row_losses - truth.row_losses).abs().sum() / truth.row_losses.sum())


def judged(
    errors: Sequence[float], own: Sequence[float | None], margin: float = PRECISION_MARGIN
) -> tuple[float, float]:
    """(error, tolerance) of several windows: the worst in float32; in low precision root mean
    squares, the tolerance `margin` times that of `own`."""
    known = [error for error in own if error is not None]
    if not known:
        return (math.nan if any(map(math.isnan, errors)) else max(errors)), FLOAT32_TOLERANCE
    return _root_mean_square(errors), max(FLOAT32_TOLERANCE, margin * _root_mean_square(known))


def window_lines(
    errors: Sequence[float], own: Sequence[float | None], precision: str
) -> tuple[str, ...]:
    """A line for each window in low precision: what it is off, and what one big batch is."""
    return tuple(
        f"window {i}: {error:.2e} off, one big batch in {precision} {known:.2e}, "
        f"{error / (known or math.inf):.3f} times"
        for i, (error, known) in enumerate(zip(errors, own, strict=True), start=1)
        if known is not None
    )


def precision_margin(engine: Engine) -> float:
    return ZERO_PRECISION_MARGIN if engine.name.startswith("zero") else PRECISION_MARGIN


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def low_precision_peer(
    engine: Engine, make_plain: Callable[[], torch.nn.Module]
) -> BigBatch | None:
    """One process's big batch in the engine's precision; None in float32."""
    if engine.mixed_precision not in ("bf16", "fp16"):
        return None
    dtype = torch.bfloat16 if engine.mixed_precision == "bf16" else torch.float16
    scale = 1.0 if dtype == torch.bfloat16 else 1024.0
    if engine.name in ("single", "ddp"):
        return BigBatch(make_plain(), torch.float32, engine.device, autocast=dtype, scale=scale)
    return BigBatch(
        make_plain(), dtype, engine.device, scale=scale
    )  # these cast the weights themselves


def unequal_names(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal to the bit on all ranks; the same list on all."""
    digests = {
        name: hashlib.blake2b(
            t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).digest()
        for name, t in tensors.items()
    }
    ranks = engine.gather_objects(digests)
    names = {name for rank in ranks for name in rank}
    return sorted(name for name in names if len({rank.get(name) for rank in ranks}) > 1)


def _count_exchanges(model: torch.nn.Module) -> list[int]:
    """[exchanges of gradients so far], counted by DDP itself; stays [0] where it is not DDP that
    exchanges."""
    counted = [0]
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(group: Any, bucket: Any) -> Any:
            counted[0] += bucket.is_last()
            return allreduce_hook(group, bucket)

        hook.__annotations__ = {}  # DDP wants classes there, and finds their names as text
        with contextlib.suppress(RuntimeError):  # the user's own hook is there already
            model.register_comm_hook(None, hook)
    return counted


@contextlib.contextmanager
def _given_to(optimizer: Any) -> Iterator[list[float]]:
    """Note the square of each gradient (of this rank's shards) that the innermost torch optimizer
    is given at a step."""
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


# --- the report ---


def _update_checks(found: list[_Measurement], session: _Session) -> list[Check]:
    wholes, tails = [m for m in found if not m.is_tail], [m for m in found if m.is_tail]
    batch = session.acc.plan.global_batch_size
    checks = []
    if wholes:
        meaning = (
            f"the gradient of {len(wholes)} window{'s' if len(wholes) > 1 else ''} of "
            f"{batch} samples is that of one big batch in float64"
        )
        checks.append(_gradient_check("update = one big batch", wholes, meaning, session))
    if tails:
        last = (
            "the epoch's last window"
            if len(tails) == 1
            else f"the last windows of {len(tails)} epochs"
        )
        meaning = f"the same for {last}, of {tails[0].num_samples} samples"
        checks.append(_gradient_check("tail window", tails, meaning, session))
    else:
        meaning = f"there is none: {len(session.subject.rows)} samples are a multiple of {batch}"
        checks.append(Check("tail window", INFO, meaning))
    margin = precision_margin(session.engine)
    loss = judged([m.loss_error for m in found], [m.own_loss_error for m in found], margin)
    return [
        *checks,
        measured(
            "logged loss", *loss, "the loss that is logged is the big batch's mean over its targets"
        ),
    ]


def _gradient_check(
    name: str, windows: list[_Measurement], meaning: str, session: _Session
) -> Check:
    errors, own = [m.error for m in windows], [m.own_error for m in windows]
    margin = precision_margin(session.engine)
    error, tolerance = judged(errors, own, margin)
    precision = session.engine.mixed_precision
    if precision != "no":
        meaning += (
            f", by root mean square within {margin:g} times what one big batch in {precision} is "
            "off "
            f"({tolerance / margin:.1e})"
        )
    worst = max(windows, key=lambda m: m.error / (m.own_error or 1.0))
    otherwise = f"the gradient is not the big batch's; most of the difference is in {worst.worst}"
    return measured(
        name, error, tolerance, meaning, otherwise, window_lines(errors, own, precision)
    )


def _loop_checks(found: list[_Measurement], session: _Session) -> list[Check]:
    unequal = sorted({name for m in found for name in m.unequal})
    ranks = session.engine.world_size
    equal = (
        f"all weights are equal to the bit on {ranks} ranks after each update"
        if ranks > 1
        else "one rank only"
    )
    differ = f"after an update the ranks hold different weights of {', '.join(unequal[:3])}"
    equality = Check(
        "equal weights",
        FAIL if unequal else PASS if ranks > 1 else INFO,
        differ if unequal else equal,
    )
    return [
        _exchange_check(found, session),
        equality,
        _clip_check(found, session.acc.max_grad_norm),
    ]


def _exchange_check(found: list[_Measurement], session: _Session) -> Check:
    name, policy = "gradient exchanges", session.engine.grad_sync
    if session.engine.world_size == 1:
        return Check(name, INFO, "one rank: nothing is exchanged")
    if not any(m.exchanges for m in found):
        return Check(
            name, INFO, f"not counted on {session.engine.name}; grad_sync={policy} is in force"
        )
    wrong = [m for m in found if m.exchanges != m.expected_exchanges]
    if wrong:
        meaning = (
            f"{wrong[0].exchanges} exchanges in a window where grad_sync={policy} makes "
            f"{wrong[0].expected_exchanges}"
        )
        return Check(name, FAIL, meaning)
    most = max(m.exchanges for m in found)
    return Check(
        name,
        PASS,
        f"counted: {most} per window (grad_sync={policy}, "
        f"K={session.acc.plan.gradient_accumulation_steps})",
    )


def _clip_check(found: list[_Measurement], max_grad_norm: float | None) -> Check:
    error, tolerance = judged([m.norm_error for m in found], [m.own_error for m in found])
    largest = max(m.norm for m in found)
    if max_grad_norm is None:
        meaning = f"no clipping: the optimizer is given the big batch's norm (up to {largest:.3g})"
    elif largest > max_grad_norm:
        meaning = (
            f"norm {largest:.3g} is reported as the big batch's and clipped once, to "
            f"{max_grad_norm:g}"
        )
    else:
        meaning = (
            f"the big batch's norm is reported; at most {largest:.3g}, it never reaches "
            f"max_grad_norm={max_grad_norm:g}"
        )
    otherwise = (
        "the norm reported, or that of the gradient given to the optimizer, is not the "
        "big batch's clipped once"
    )
    return measured("norm and clipping", error, max(tolerance, NORM_TOLERANCE), meaning, otherwise)


def _engine_check(subject: Subject) -> Check:
    engine, plan = subject.accumulator.engine, subject.accumulator.plan
    meaning = (
        f"{engine.name} on {engine.device.type}, precision {engine.mixed_precision}, "
        f"{plan.describe()}; "
        "every source of K agrees, or this would not have started"
    )
    if plan.gradient_accumulation_steps * plan.world_size == 1:
        meaning += ". K = 1 on one process cuts nothing: verify the K that you train with"
    return Check("engine in force", INFO, meaning)


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
