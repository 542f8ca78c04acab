"""One contract, run on every engine: each case trains something small and returns numbers that a
test can judge.

Every case compares with an independent reference (one float64 big batch, or arithmetic by hand). It
runs in one process or in each of several, and must not know in how many: B and K are given for the
effective batch it names.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from accum_trainer import Accumulator, DataError, EngineError, causal_lm_loss
from accum_trainer.losses import chunked, head
from accum_trainer.losses.packing import find_packing, worst_of
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.window_plan import Cost, Cut, global_order, windows_of
from benchmarks.grad_sync import counting
from tests.reference import (
    IGNORE,
    big_batch,
    make_model,
    make_rows,
    num_targets,
    pad,
    relative_error,
)

CASES: dict[str, Callable[[], dict[str, Any]]] = {}


# Cases that pass an Accelerator of their own; a sharded engine is built from arguments.
OF_ACCELERATE: set[str] = set()


def case_of_accelerate(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    OF_ACCELERATE.add(function.__name__)
    return case(function)


def case(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


ENGINE: dict[
    str, Any
] = {}  # what the worker was told of the engine: zero_stage, fsdp, grad_sync; cpu; backend


def forget_accelerate(whole: bool = False) -> None:
    """Let a process build another Accelerator; `whole`: with other processes and devices too."""
    # accelerate keeps its state in classes and has no public way to drop it.
    AcceleratorState._reset_state(reset_partial_state=whole)
    if whole:
        GradientState._reset_state()


def accumulator(micro_batch_size: int | None, **options: Any) -> Accumulator:
    engine = {} if "accelerator" in options else {"cpu": True} | ENGINE
    backend = engine.pop("backend", None)  # on a GPU; accelerate's choice there is NCCL
    if backend is not None:
        from accelerate import InitProcessGroupKwargs

        handlers = [*options.get("kwargs_handlers", ()), InitProcessGroupKwargs(backend=backend)]
        options = options | {"kwargs_handlers": handlers}
    if (
        "zero_stage" in engine
    ):  # accelerate takes one DeepSpeed plugin per process; a case may build several
        forget_accelerate()
    return Accumulator(micro_batch_size=micro_batch_size, **(engine | options))


class Probe:
    """A model under an optimizer whose averaged gradient is seen at the moment of the step, whole,
    on every engine."""

    def __init__(
        self, acc: Accumulator, model: torch.nn.Module, lr: float = 0.1, schedule: Any = None
    ) -> None:
        self.acc, self.lr = acc, lr
        self.pristine = copy.deepcopy(model)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.stepped: list[dict[str, torch.Tensor]] = []
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, schedule) if schedule else None
        self.model, self.optimizer = acc.prepare(model, sgd)
        self.trained = sum(p.numel() for p in self.pristine.parameters() if p.requires_grad)

    def step(self, scheduler: Any = None) -> Any:
        self.stepped.append(self.gradient())
        return self.acc.step(self.optimizer, scheduler)

    def gradient(self) -> dict[str, torch.Tensor]:
        return {n: g.clone().cpu() for n, g in self.acc.engine.full_gradients(self.model).items()}

    def left(self) -> int:
        """Gradients that this rank still holds, in parameters or in ZeRO's shards."""
        engine = getattr(self.model, "optimizer", None)
        shards = getattr(engine, "averaged_gradients", {}).values()
        held = sum(p.grad is not None for p in self.acc.engine.unwrap(self.model).parameters())
        return held + sum(bool(shard) for shard in shards)

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            n: w.clone()
            for n, w in self.acc.engine.full_weights(self.model, trained_only=True).items()
        }

    def exact(self, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradient of one float64 big batch at the weights of now."""
        now = copy.deepcopy(self.pristine)
        now.load_state_dict(self.weights(), strict=False)
        return big_batch(now, rows)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def summed(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, str]:
    return causal_lm_loss(model, batch), "sum"


def models_own_mean(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, str]:
    return model(**batch).loss, "mean"


def compare(
    probe: Probe, windows: Any, expected: list[list[dict]], loss: Any = summed
) -> dict[str, Any]:
    """Run one epoch; compare each update with the float64 big batch of the rows it should have
    seen."""
    errors, loss_errors, sizes = [], [], []
    for window, rows in zip(windows, expected, strict=True):
        exact_loss, exact = probe.exact(rows)
        for batch in window:
            with probe.acc.accumulate(probe.model):
                value, reduction = loss(probe.model, batch)
                probe.acc.backward(value, reduction=reduction)
        update = probe.step()
        errors.append(relative_error(probe.stepped[-1], exact))
        loss_errors.append(abs(update.loss - exact_loss) / exact_loss)
        sizes.append([update.num_samples, len(rows), update.num_targets, num_targets(rows)])
    return {"errors": errors, "loss_errors": loss_errors, "sizes": sizes}


def planned(rows: list[dict], batch: int, epoch: int = 0) -> list[list[dict]]:
    return [
        [rows[i] for i in window] for window in windows_of(global_order(len(rows), 0, epoch), batch)
    ]


def lengths(rows: list[dict]) -> np.ndarray:
    return np.array([len(row["input_ids"]) for row in rows])


# --- exactness: 37 rows divide by nothing, three have no target ---


def _planned_case(kind: str, **options: Any) -> dict[str, Any]:
    rows = make_rows(37, all_masked=(3, 4, 8))
    acc = accumulator(3, global_batch_size=12, **options)
    probe = Probe(acc, make_model(kind))
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows))
    return compare(probe, windows, planned(rows, 12)) | {"length": len(windows)}


@case
def planned_llama() -> dict[str, Any]:
    return _planned_case("llama")


@case
def planned_gpt2() -> dict[str, Any]:
    return _planned_case("gpt2")


@case
def planned_lora() -> dict[str, Any]:
    return _planned_case("lora")


@case
def planned_every_microbatch() -> dict[str, Any]:
    return _planned_case("llama", grad_sync="every-microbatch")


@case
def planned_checkpointing() -> dict[str, Any]:
    rows = make_rows(37, all_masked=(3, 4, 8))
    model = make_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, model.train())
    return compare(probe, acc.windows(rows, collate_fn=pad), planned(rows, 12))


@case
def planned_with_workers() -> dict[str, Any]:
    rows = make_rows(37)
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad, num_workers=1), planned(rows, 12))


def _loader_case(kind: str, loss: Any, rows: list[dict]) -> dict[str, Any]:
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model(kind))
    loader = DataLoader(rows, batch_size=3, collate_fn=pad)
    expected = [rows[begin : begin + 12] for begin in range(0, len(rows), 12)]
    return compare(probe, acc.windows(loader), expected, loss)


@case
def loader_llama_own_mean() -> dict[str, Any]:
    # Rows 6 to 8 are one micro-batch without a target, whose own mean is nan; 35 rows leave an odd
    # tail.
    return _loader_case("llama", models_own_mean, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_lora_own_mean() -> dict[str, Any]:
    return _loader_case("lora", models_own_mean, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_gpt2_sum() -> dict[str, Any]:
    return _loader_case("gpt2", summed, make_rows(35, all_masked=(6, 7, 8)))


@case
def loader_shuffled_every_sample_once() -> dict[str, Any]:
    rows = [{"input_ids": [1, 2 + i], "labels": [1, 2 + i]} for i in range(35)]
    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make_model("llama"))
    torch.manual_seed(rank())  # ranks whose own seeds differ still agree on the order
    windows = acc.windows(DataLoader(rows, batch_size=3, shuffle=True, collate_fn=pad))
    orders = []
    for _ in range(2):
        seen: list[int] = []
        for window in windows:
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
                seen += (batch["input_ids"][:, 1] - 2).tolist()
            probe.step()
        orders.append([index for part in acc.engine.gather_objects(seen) for index in part])
    return {"orders": orders}


@case
def stream_unsized() -> dict[str, Any]:
    """Ranks hold different numbers of batches of different sizes, and end in the middle of a
    window."""
    rows = make_rows(41)
    per_rank = [rows] if world_size() == 1 else [rows[:26], rows[26:]]

    def batches(of: int) -> Iterator[list[dict]]:
        mine = per_rank[of]
        for begin in range(0, len(mine), 3):
            yield mine[begin : begin + 3]

    acc = accumulator(3, gradient_accumulation_steps=4 // world_size())
    probe = Probe(acc, make_model("llama"))
    expected: list[list[dict]] = []
    k = acc.plan.gradient_accumulation_steps
    for of in range(world_size()):
        for index, batch in enumerate(batches(of)):
            while len(expected) <= index // k:
                expected.append([])
            expected[index // k] += batch
    windows = acc.windows(pad(batch) for batch in batches(rank()))
    return compare(probe, windows, expected) | {"gradients_left": probe.left()}


@case_of_accelerate
def own_accelerator_with_k() -> dict[str, Any]:
    """The user's Accelerator divides by its own K as well; the weights cancel it, in tails too."""
    from accelerate import Accelerator

    rows = make_rows(37)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 // world_size())
    acc = accumulator(3, accelerator=accelerator)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad), planned(rows, 12)) | {
        "k": acc.plan.gradient_accumulation_steps
    }


# --- losses ---


@case
def i2_three_against_three_hundred() -> dict[str, Any]:
    few = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    ids = np.random.RandomState(0).randint(1, 97, 301).tolist()
    rows = [few, {"input_ids": ids, "labels": ids}]
    acc = accumulator(1, global_batch_size=2)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad, shuffle=False), [rows])


class SwallowsKwargs(torch.nn.Module):
    """A model that takes **kwargs and averages by its own idea, whatever `num_items_in_batch` it is
    told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inner(
            input_ids=input_ids, attention_mask=kwargs["attention_mask"], labels=labels
        ).loss


@case
def i3_kwargs_model_has_one_norm() -> dict[str, Any]:
    rows = make_rows(8)
    norms = []
    for k in (1, 8 // world_size()):
        acc = accumulator(8 // world_size() // k, gradient_accumulation_steps=k)
        probe = Probe(acc, SwallowsKwargs())
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(probe.model(**batch), reduction="mean")
            norms.append(probe.step().grad_norm)
    exact = big_batch(make_model("llama"), rows)[1]
    return {"norms": norms, "exact": sum((g**2).sum().item() for g in exact.values()) ** 0.5}


def _regression(loss: Callable[[torch.Tensor], tuple[torch.Tensor, str]]) -> dict[str, Any]:
    """Squared error of y = x.w over 13 samples at B_eff 8: the gradient by hand, in float64."""
    x = torch.randn(13, 3, generator=torch.Generator().manual_seed(1))
    y = torch.randn(13, generator=torch.Generator().manual_seed(2))
    data = torch.utils.data.TensorDataset(x, y)
    acc = accumulator(2, global_batch_size=8)
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    probe = Probe(acc, model)
    errors = []
    windows = acc.windows(data, count_targets=lambda batch: len(batch[1]))
    for window, indices in zip(windows, windows_of(global_order(13, 0, 0), 8), strict=True):
        wx, wy = x[indices].double(), y[indices].double()
        exact = (
            2 * ((wx @ probe.weights()["weight"].double().T).squeeze(1) - wy) @ wx / len(indices)
        )
        for bx, by in window:
            with acc.accumulate(probe.model):
                value, reduction = loss((probe.model(bx).squeeze(1) - by) ** 2)
                acc.backward(value, reduction=reduction)
        probe.step()
        errors.append(
            ((probe.stepped[-1]["weight"][0].double() - exact).norm() / exact.norm()).item()
        )
    return {"errors": errors}


@case
def i4_own_loss_as_sum() -> dict[str, Any]:
    return _regression(lambda squares: (squares.sum(), "sum"))


@case
def i4_own_loss_as_mean() -> dict[str, Any]:
    return _regression(lambda squares: (squares.mean(), "mean"))


@case
def i8_sum_of_weights_is_the_denominator() -> dict[str, Any]:
    """Loss sum(w_i * v * x_i) / sum(w_i) has the gradient sum(w_i x_i) / sum(w_i): by hand."""
    x, w = torch.arange(1.0, 11.0), torch.linspace(0.1, 1.9, 10)
    acc = accumulator(1, global_batch_size=4)
    model = torch.nn.Linear(1, 1, bias=False)
    probe = Probe(acc, model)
    found, exact = [], []
    windows = acc.windows(
        torch.utils.data.TensorDataset(x, w),
        shuffle=False,
        count_targets=lambda batch: float(batch[1].double().sum()),
    )
    for begin, window in zip((0, 4, 8), windows, strict=True):
        for bx, bw in window:
            with acc.accumulate(probe.model):
                acc.backward((bw * probe.model(bx.unsqueeze(1)).squeeze(1)).sum(), reduction="sum")
        probe.step()
        found.append(probe.stepped[-1]["weight"].item())
        wx, ww = x[begin : begin + 4].double(), w[begin : begin + 4].double()
        exact.append(((wx * ww).sum() / ww.sum()).item())
    return {"found": found, "exact": exact}


@case
def i5_splits_log_the_same_loss() -> dict[str, Any]:
    rows, curves = make_rows(40), []
    for micro in (8, 4, 2, 1):
        if micro * world_size() > 8:
            continue
        acc = accumulator(micro, global_batch_size=8)
        probe = Probe(acc, make_model("llama"))
        curves.append([])
        for window in acc.windows(rows, collate_fn=pad, lengths=lengths(rows)):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            curves[-1].append(probe.step().loss)
    return {"curves": curves}


@case
def i10_no_target_anywhere() -> dict[str, Any]:
    """Windows of 4: the first has targets on one row only, the second none at all, the third is
    ordinary."""
    rows = make_rows(12, all_masked=(0, 1, 2, 4, 5, 6, 7))
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, make_model("llama"), schedule=lambda update: 1 / (1 + update))
    scheduler = acc.prepare(probe.scheduler)
    results = []
    exact = []
    for index, window in enumerate(acc.windows(rows, collate_fn=pad, shuffle=False)):
        before = probe.weights()
        exact.append(None if index == 1 else probe.exact(rows[index * 4 : index * 4 + 4])[1])
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(probe.model(**batch).loss, reduction="mean")
        update = probe.step(scheduler)
        unchanged = equal(before, probe.weights())
        lr = probe.optimizer.param_groups[0]["lr"]
        results.append([update.step, update.skipped, update.reason, unchanged, lr, probe.left()])
    errors = [relative_error(probe.stepped[i], exact[i]) for i in (0, 2)]
    return {"results": results, "errors": errors}


# --- windows ---


class Slope(torch.nn.Module):
    """Output w * x: the gradient of the summed output is the sum of x, so a person can compute
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


def _slope(
    values: list[float], order: list[int] | None = None, **options: Any
) -> tuple[Probe, list[Any]]:
    """Train Slope on batches of one value each, window by window of B_eff = 4."""
    acc = accumulator(1, global_batch_size=4, **options)
    probe = Probe(acc, Slope())
    data = torch.tensor(values)[order] if order else torch.tensor(values)
    updates = []
    for window in acc.windows(DataLoader(data, batch_size=1), count_targets=len):
        for x in window:
            with acc.accumulate(probe.model):
                acc.backward(probe.model(x).sum(), reduction="sum")
        updates.append(probe.step())
    return probe, updates


@case
def i10_a_rank_without_targets_under_the_models_own_mean() -> dict[str, Any]:
    """The last rank's rows have no target, so that the model's own mean there is nan."""
    rows = make_rows(8)
    if world_size() > 1:
        for row in rows[4:]:
            row["labels"] = [IGNORE] * len(row["labels"])
    mine = rows[rank() * 4 : rank() * 4 + 4] if world_size() > 1 else rows
    acc = accumulator(2, gradient_accumulation_steps=len(mine) // 2)
    probe = Probe(acc, make_model("llama"))
    batches = [pad(mine[begin : begin + 2]) for begin in range(0, len(mine), 2)]
    return compare(probe, acc.windows(iter(batches)), [rows], models_own_mean)


@case
def optimizer_steps_inside_accumulate() -> dict[str, Any]:
    """As Accelerate's examples do, also when gradients are reduced after the last backward."""
    rows, weights = make_rows(21), []
    for recover, inside in (("auto", False), ("auto", True), ("always", True)):
        acc = accumulator(2, global_batch_size=8, recover_from_oom=recover)
        probe = Probe(acc, make_model("llama"))
        for batch in acc.batches(rows, collate_fn=pad):
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
                if inside:
                    probe.optimizer.step()
                    probe.optimizer.zero_grad()
            if not inside:
                probe.optimizer.step()
                probe.optimizer.zero_grad()
        weights.append(probe.weights())
        assert acc.num_updates == 3
    after, *inside_weights = weights
    return {"errors": [relative_error(found, after) for found in inside_weights]}


@case
def trained_parameters_change_after_prepare() -> dict[str, Any]:
    """One layer is unfrozen, or frozen, between two windows: exact, or refused with the remedy."""
    found = {}
    for change in ("unfreeze", "freeze"):
        rows = make_rows(16)
        acc = accumulator(2, global_batch_size=8)
        model = make_model("llama")
        model.model.layers[0].requires_grad_(change == "freeze")
        probe = Probe(acc, model)
        said, errors = "", []
        try:
            for number, window in enumerate(acc.windows(rows, collate_fn=pad)):
                # Also the weights that are frozen by now: they were trained before.
                probe.pristine.load_state_dict(acc.engine.full_weights(probe.model))
                exact = probe.exact(planned(rows, 8)[number])[1]
                for batch in window:
                    with acc.accumulate(probe.model):
                        acc.backward(causal_lm_loss(probe.model, batch))
                probe.step()
                errors.append(relative_error(probe.stepped[-1], exact))
                if number == 0:
                    for module in (acc.engine.unwrap(probe.model), probe.pristine):
                        module.model.layers[0].requires_grad_(change == "unfreeze")
                    if change == "unfreeze" and acc.engine.can_change_trained:
                        layer = acc.engine.unwrap(probe.model).model.layers[0]
                        probe.optimizer.add_param_group({"params": list(layer.parameters())})
        except EngineError as error:
            said = str(error)
        found[change] = {"errors": errors, "said": said}
    return found


@case
def i13_tail_window_is_the_mean_of_its_own() -> dict[str, Any]:
    probe, updates = _slope([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i17_odd_counts_every_sample_once() -> dict[str, Any]:
    """11 samples at B_eff 4: means 2.5, 6.5, 10; the tail of 3 leaves ranks unequal."""
    probe, updates = _slope([float(v) for v in range(1, 12)])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i17_rank_without_a_sample() -> dict[str, Any]:
    probe, updates = _slope([1.0, 2.0, 3.0, 4.0, 7.0])
    return {
        "gradients": [g["w"].item() for g in probe.stepped],
        "samples": [u.num_samples for u in updates],
    }


@case
def i19_constant_gradient_is_one() -> dict[str, Any]:
    return {
        f"{policy} K={k}": [g["w"].item() for g in _constant(policy, k).stepped]
        for policy in ("once-per-window", "every-microbatch")
        for k in (1, 3, 8)
    }


def _constant(policy: str, k: int) -> Probe:
    acc = accumulator(2, gradient_accumulation_steps=k, grad_sync=policy)
    probe = Probe(acc, Slope())
    for window in acc.windows(DataLoader(torch.ones(37), batch_size=2), count_targets=len):
        for x in window:
            with acc.accumulate(probe.model):
                acc.backward(probe.model(x).sum(), reduction="sum")
        probe.step()
    return probe


@case
def i14_gradients_empty_at_every_window() -> dict[str, Any]:
    rows = make_rows(22)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    left = []
    windows = acc.windows(rows, collate_fn=pad)
    for _ in range(2):
        for window in windows:
            left.append(probe.left())
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
    return {"left": left, "updates": acc.num_updates, "epoch": windows.epoch}


def _with_scaler(**options: Any) -> tuple[Accumulator, torch.amp.GradScaler]:
    """An Accumulator under fp16's loss scaler; the scaler runs on the CPU too, accelerate just
    never makes one there."""
    from accelerate import Accelerator

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    return accumulator(2, global_batch_size=8, accelerator=accelerator, **options), scaler


@case_of_accelerate
def i15_scaler_two_epochs() -> dict[str, Any]:
    rows = make_rows(22)
    acc, scaler = _with_scaler()
    probe = Probe(acc, make_model("llama"))
    windows = acc.windows(rows, collate_fn=pad)
    scales, errors = [], []
    for epoch in range(2):
        for window, expected in zip(windows, planned(rows, 8, epoch), strict=True):
            exact = probe.exact(expected)[1]
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
            errors.append(relative_error(probe.stepped[-1], exact))
            scales.append(scaler.get_scale())
    return {"scales": scales, "errors": errors, "updates": acc.num_updates}


@case
def i16_consumed_as_planned_and_equal_exchanges() -> dict[str, Any]:
    rows = make_rows(45)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    exchanged = _count_exchanges(probe)
    gathers = []
    gather = acc.engine.all_gather_floats
    acc.engine.all_gather_floats = lambda values: gathers.append(len(values)) or gather(values)  # type: ignore[method-assign]
    ran = planned_batches = 0
    for window in acc.windows(rows, collate_fn=pad, lengths=lengths(rows)):
        planned_batches += window.num_micro_batches
        for batch in window:
            ran += 1
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
        probe.step()
    return {
        "ran": int(acc.engine.gather_objects(ran) and sum(acc.engine.gather_objects(ran))),
        "planned": planned_batches,
        "gathers": acc.engine.gather_objects(gathers),
        "exchanged": acc.engine.gather_objects(exchanged),
        "updates": acc.num_updates,
        "engine": acc.engine.name,
        "equal": acc.engine.equal_micro_batches,
    }


@case
def counts_of_the_next_window_travel_with_the_end_of_this() -> dict[str, Any]:
    """Numbers in each exchange of small numbers over an epoch of six windows, for sources that read
    ahead and one that does not."""
    rows = make_rows(45)
    found = {}
    sources: dict[str, dict[str, Any]] = {
        "as asked for": {},
        "thread": {"prefetch": True},
        "process": {"num_workers": 1},
    }
    if (
        ENGINE.get("zero_stage") == 3
    ):  # each engine made before reserves 2 GB of addresses: too many of them to fork
        del sources["process"]
    for name, options in sources.items():
        acc = accumulator(2, global_batch_size=8)
        probe = Probe(acc, make_model("llama"))
        gathers: list[int] = []
        gather = acc.engine.all_gather_floats
        acc.engine.all_gather_floats = lambda values, to=gathers, gather=gather: (
            to.append(len(values)) or gather(values)
        )  # type: ignore[method-assign]
        windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows), **options)
        found[name] = compare(probe, windows, planned(rows, 8)) | {"gathers": gathers}
    return found


@case
def reading_ahead_survives_breaks_epochs_and_resuming() -> dict[str, Any]:
    """Two windows and a break, the rest of the epoch, another epoch, and a new run from the
    position after the break."""
    rows = make_rows(45)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows), prefetch=True)
    found = [compare(probe, islice(windows, 2), planned(rows, 8)[:2])]
    position = windows.state_dict()
    windows.load_state_dict(position)
    found.append(compare(probe, windows, planned(rows, 8)[2:]))
    found.append(compare(probe, windows, planned(rows, 8, epoch=1)))
    resumed = acc.windows(rows, collate_fn=pad, lengths=lengths(rows), prefetch=True)
    resumed.load_state_dict(position)
    found.append(compare(probe, resumed, planned(rows, 8)[2:]))
    return {
        "errors": [error for one in found for error in one["errors"]],
        "sizes": [seen for one in found for seen, *_ in one["sizes"]],
        "position": position,
    }


class _Unreadable:
    """Rows, of which the last rank cannot read those of one window of the global order."""

    def __init__(self, rows: list[dict], unreadable: list[int]) -> None:
        self.rows, self.unreadable = rows, set(unreadable)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if rank() == world_size() - 1 and index in self.unreadable:
            raise OSError("the disk is gone")
        return self.rows[index]


@case
def window_that_one_rank_cannot_read() -> dict[str, Any]:
    rows = make_rows(24)
    first, second, _ = planned(rows, 8)
    unreadable = [i for i, row in enumerate(rows) if any(row is other for other in second)]
    found = {}
    for name, prefetch in {"as asked for": False, "ahead": True}.items():
        acc = accumulator(2, global_batch_size=8)
        probe = Probe(acc, make_model("llama"))
        windows = acc.windows(
            _Unreadable(rows, unreadable), collate_fn=pad, lengths=lengths(rows), prefetch=prefetch
        )
        found[name] = _until_it_fails(probe, windows, first)
    return found


def _until_it_fails(probe: Probe, windows: Any, first: list[dict]) -> dict[str, Any]:
    """Train until the data fails; compare the first update with the big batch of `first`."""
    errors: list[float] = []
    raised = ""
    exact = probe.exact(first)[1]
    try:
        for window in windows:
            for batch in window:
                with probe.acc.accumulate(probe.model):
                    probe.acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
            errors = errors or [relative_error(probe.stepped[-1], exact)]
    except (OSError, DataError) as error:
        raised = f"{type(error).__name__}: {error}"
    return {"errors": errors, "updates": probe.acc.num_updates, "raised": raised}


class _Shorter(torch.utils.data.IterableDataset):
    """A stream that all ranks are to read alike, and that ends a window earlier on the last of
    several."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        ends_early = world_size() > 1 and rank() == world_size() - 1
        yield from self.rows[:16] if ends_early or world_size() == 1 else self.rows


@case
def ranks_that_end_at_different_windows() -> dict[str, Any]:
    rows = make_rows(24)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    loader = DataLoader(_Shorter(rows), batch_size=2, collate_fn=pad)
    found = _until_it_fails(probe, acc.windows(loader), rows[:8])
    return {"updates": found["updates"], "raised": found["raised"]}


def _count_exchanges(probe: Probe) -> list[int]:
    """Have DDP note the numbers in each bucket it reduces; stays empty where nothing is
    exchanged."""
    exchanged: list[int] = []
    if isinstance(probe.model, torch.nn.parallel.DistributedDataParallel):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):  # DDP refuses annotations that are text
            exchanged.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        probe.model.register_comm_hook(None, hook)
    return exchanged


@case
def exchanges_per_window() -> dict[str, Any]:
    """Numbers reduced in each window, as multiples of the trained parameters, for each policy and
    K."""
    result = {}
    for policy in ("once-per-window", "every-microbatch"):
        for k in (1, 2, 8):
            acc = accumulator(1, gradient_accumulation_steps=k, grad_sync=policy)
            probe = Probe(acc, make_model("llama"))
            _count_exchanges(probe)  # has DDP reduce through a Python function, which is then seen
            per_window = []
            for window in acc.windows(make_rows(3 * k * world_size()), collate_fn=pad):
                with counting() as counted:
                    for batch in window:
                        with acc.accumulate(probe.model):
                            acc.backward(causal_lm_loss(probe.model, batch))
                per_window.append(sum(counted) / probe.trained)
                acc.step(probe.optimizer)
            result[f"{policy} K={k}"] = per_window
    return result


@case
def i21_order_of_micro_batches_does_not_matter() -> dict[str, Any]:
    rows = make_rows(16)
    gradients = []
    for seed in range(3):
        order = np.random.RandomState(seed).permutation(16)
        acc = accumulator(2, global_batch_size=16)
        probe = Probe(acc, make_model("llama"))
        loader = DataLoader([rows[i] for i in order], batch_size=2, collate_fn=pad)
        for window in acc.windows(loader):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
        gradients.append(probe.stepped[-1])
    exact = {name: g.double() for name, g in gradients[0].items()}
    return {"errors": [relative_error(g, exact) for g in gradients[1:]]}


# --- the step ---


@case
def i31_one_clip_of_the_averaged_gradient() -> dict[str, Any]:
    rows, results = make_rows(16), []
    exact = big_batch(make_model("llama"), rows)[1]
    norm = sum((g**2).sum().item() for g in exact.values()) ** 0.5
    limit = norm / 3
    clipped = {name: g * (limit / norm) for name, g in exact.items()}
    for micro in (8, 4, 1):
        acc = accumulator(micro, global_batch_size=16, max_grad_norm=limit)
        # Seen in what it did to the weights, on every engine; a large rate, so that their rounding
        # does not hide it.
        probe = Probe(acc, make_model("llama"), lr=64.0)
        before = probe.weights()
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            update = probe.step()
        after = probe.weights()
        moved = {name: (before[name].double() - after[name].double()) / probe.lr for name in before}
        results.append([relative_error(moved, clipped), abs(update.grad_norm - norm) / norm])
    return {"results": results, "norm": norm}


@case_of_accelerate
def i46_ranks_whose_norms_differ_in_the_last_bits() -> dict[str, Any]:
    """As GPUs of different make: one rank finds another norm of the same gradient, within the
    tolerance, or at its edge."""
    results = {}
    for name, factor in {"bits": 1 + 1e-7, "edge": 1 + 1e-5 * (1 + 5e-6)}.items():
        acc = accumulator(2, global_batch_size=8, max_grad_norm=0.01)
        probe = Probe(acc, make_model("llama"))
        if rank() == world_size() - 1 and world_size() > 1:
            own = acc.engine.square_sum
            acc.engine.square_sum = lambda parameters, own=own, factor=factor: (
                own(parameters) * factor**2
            )  # type: ignore[method-assign]
        error = ""
        try:
            for window in islice(acc.windows(make_rows(8), collate_fn=pad), 1):
                for batch in window:
                    with acc.accumulate(probe.model):
                        acc.backward(causal_lm_loss(probe.model, batch))
                update = probe.step()
            weights = acc.engine.gather_objects({n: w.numpy() for n, w in probe.weights().items()})
            equal_everywhere = all((w[n] == weights[0][n]).all() for w in weights for n in w)
            results[name] = {"equal": equal_everywhere, "norm": update.grad_norm}
        except EngineError as raised:
            error = str(raised)
        results[name] = results.get(name, {}) | {"error": error}
    return results


@case
def i32_lr_knows_updates_only() -> dict[str, Any]:
    """The lr after each update, with the step of the scheduler after every micro-batch, as
    Accelerate loops have it."""
    curves = []
    for micro in (4, 1):
        acc = accumulator(micro, global_batch_size=8)
        probe = Probe(acc, make_model("llama"), lr=1.0, schedule=lambda update: 1 / (1 + update))
        scheduler = acc.prepare(probe.scheduler)
        curve = []
        for batch in acc.batches(make_rows(27), collate_fn=pad):
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
            probe.optimizer.step()
            scheduler.step()
            probe.optimizer.zero_grad()
            if acc.last_update is not None and acc.last_update.step > len(curve):
                curve.append(scheduler.get_last_lr()[0])
        curves.append(curve)
    return {"curves": curves}


def _inject(acc: Accumulator) -> dict[str, Any]:
    """The second of four windows meets an inf on the last rank only."""
    rows = make_rows(32)
    probe = Probe(acc, make_model("llama"), schedule=lambda update: 1 / (1 + update))
    scheduler = acc.prepare(probe.scheduler)
    results = []
    for index, window in enumerate(acc.windows(rows, collate_fn=pad, shuffle=False)):
        before, lr = probe.weights(), scheduler.get_last_lr()[0]
        for number, batch in enumerate(window):
            with acc.accumulate(probe.model):
                bad = index == 1 and number == 0 and rank() == world_size() - 1
                loss = causal_lm_loss(probe.model, batch) * (float("inf") if bad else 1.0)
                acc.backward(loss, reduction="sum")
        update = probe.step(scheduler)
        results.append(
            {
                "unchanged": equal(before, probe.weights()),
                "lr_unchanged": lr == scheduler.get_last_lr()[0],
                "step": update.step,
                "reason": update.reason,
                "gradients_left": probe.left(),
            }
        )
    return {"windows": results}


@case
def i33_inf_is_dropped_everywhere() -> dict[str, Any]:
    return _inject(accumulator(2, global_batch_size=8, max_grad_norm=1.0))


@case_of_accelerate
def i33_inf_is_dropped_everywhere_under_a_scaler() -> dict[str, Any]:
    acc, scaler = _with_scaler(max_grad_norm=1.0)
    return _inject(acc) | {"scale": scaler.get_scale()}


def curve_of_one_big_batch(rows: list[dict], updates: int) -> list[float]:
    """Losses of AdamW on whole windows of 16 rows, in float64, by torch alone."""
    model = make_model("llama").double()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for epoch in itertools.count():
        for window in planned(rows, 16, epoch):
            batch = pad(window)
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            losses.append(loss.item())
            if len(losses) == updates:
                return losses
    raise AssertionError


@case
def i36_fifty_updates() -> dict[str, Any]:
    rows = make_rows(16 * 10 + 5)
    curves = {"truth": curve_of_one_big_batch(rows, 50)}
    cuts = [(micro, Cut(micro), "") for micro in ((16, 4) if world_size() == 1 else (2, 1))]
    cuts += [(4, Cut(4, packed=True), ", packed")]
    if world_size() == 2:
        cuts += [(2, Cut(2, rank_weights=(3.0, 1.0)), ", shares 3:1")]
    for micro, cut, how in cuts:
        acc = accumulator(micro, global_batch_size=16, max_grad_norm=1.0)
        model = make_model("llama")
        model.config.use_cache = (
            False  # with a cache transformers does not look for restarting positions
        )
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prepared, optimizer = acc.prepare(model, adam)
        cut = dataclasses.replace(cut, equal_counts=acc.engine.equal_micro_batches)
        collate = PackingCollator() if cut.packed else pad
        windows = acc.windows(rows, collate_fn=collate, lengths=lengths(rows), cut=cut)
        losses: list[float] = []
        while len(losses) < 50:
            for window in windows:
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                losses.append(acc.step(optimizer).loss)
                if len(losses) == 50:
                    break
        curves[f"B={micro} K={acc.plan.gradient_accumulation_steps} W={world_size()}{how}"] = losses
    return {"curves": curves}


# --- loops that exist already ---


@case_of_accelerate
def loop_of_accelerate_gives_the_same_weights() -> dict[str, Any]:
    """The windows loop, the micro-batch loop, and the micro-batch loop with everything prepared by
    accelerate."""
    from accelerate import Accelerator

    rows = make_rows(35)
    final = []
    for style in ("windows", "batches", "accelerate"):
        accelerator = Accelerator(cpu=True)
        acc = accumulator(3, global_batch_size=12, accelerator=accelerator)
        model = make_model("llama")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(rows, batch_size=3, collate_fn=pad)
        prepare = accelerator.prepare if style == "accelerate" else acc.prepare
        prepared, optimizer = prepare(model, sgd)
        if style == "windows":
            for window in acc.windows(loader):
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(prepared(**batch).loss, reduction="mean")
                acc.step(optimizer)
        else:
            for batch in acc.batches(loader):
                with acc.accumulate(prepared):
                    acc.backward(prepared(**batch).loss, reduction="mean")
                optimizer.step()
                optimizer.zero_grad()
        final.append({name: p.detach().clone() for name, p in model.named_parameters()})
    reference = {name: p.double() for name, p in final[0].items()}
    start = {n: p.double() for n, p in make_model("llama").named_parameters()}
    return {
        "moved": relative_error(start, reference),
        "errors": [relative_error(weights, reference) for weights in final[1:]],
    }


@case_of_accelerate
def loader_sharded_by_accelerate_is_taken_as_it_is() -> dict[str, Any]:
    from accelerate import Accelerator

    rows = make_rows(24)
    accelerator = Accelerator(cpu=True)
    acc = accumulator(3, global_batch_size=12, accelerator=accelerator)
    loader = accelerator.prepare(DataLoader(rows, batch_size=3, collate_fn=pad))
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(loader), [rows[:12], rows[12:]])


@case
def position_survives_another_world() -> dict[str, Any]:
    """Stop after two windows, continue from the saved position: the rest of the epoch, then the
    next."""
    rows = make_rows(30)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    first = acc.windows(rows, collate_fn=pad)
    for count, window in enumerate(first, start=1):
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
        probe.step()
        if count == 2:
            break
    state = copy.deepcopy(first.state_dict())
    second = acc.windows(rows, collate_fn=pad)
    second.load_state_dict(state)
    rest = compare(probe, second, planned(rows, 8)[2:])
    following = compare(probe, second, planned(rows, 8, epoch=1))
    return {"state": state, "errors": rest["errors"] + following["errors"]}


@case
def masked_prompt_of_first_label_is_not_counted() -> dict[str, Any]:
    """A row whose only label stands on its first token has no target: nothing predicts a first
    token."""
    rows = [*make_rows(7), {"input_ids": [5, 6, 7], "labels": [5, IGNORE, IGNORE]}]
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("gpt2"))
    return compare(probe, acc.windows(rows, collate_fn=pad), [rows])


@case
def i7_label_smoothing() -> dict[str, Any]:
    """By the definition: (1 - s) * nll + s * mean over the vocabulary of -log p, in float64."""
    rows, smoothing = make_rows(10), 0.1
    acc = accumulator(2, global_batch_size=10 if world_size() == 1 else 12)
    probe = Probe(acc, make_model("llama"))
    exact_model = copy.deepcopy(probe.pristine).double()
    batch = pad(rows)
    log_p = (
        exact_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1]
        .log_softmax(-1)
    )
    labels = batch["labels"][:, 1:]
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    ((each * (labels != IGNORE)).sum() / num_targets(rows)).backward()
    exact = {name: p.grad for name, p in exact_model.named_parameters()}
    for window in acc.windows(rows, collate_fn=pad):
        for part in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, part, label_smoothing=smoothing))
        probe.step()
    return {"errors": [relative_error(probe.stepped[-1], exact)]}


@case
def i9_each_term_of_two() -> dict[str, Any]:
    """Loss sum(w x) over samples, and a term 100 w x_k of each micro-batch k: 101 times the
    mean."""
    values = torch.arange(1.0, 12.0)  # windows of 4, 4 and 3 micro-batches of one sample
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, Slope())
    for window in acc.windows(DataLoader(values, batch_size=1), count_targets=len):
        for x in window:
            with acc.accumulate(probe.model):
                out = probe.model(torch.stack([x, 100 * x]))
                acc.backward(out[0].sum(), reduction="sum", auxiliary=out[1].mean())
        probe.step()
    return {"gradients": [g["w"].item() for g in probe.stepped]}


@case
def i30_gradients_accumulate_in_float32() -> dict[str, Any]:
    """Weights in bf16 and micro-batches with gradients 256, 1, -256: the sum is 1, which bf16 would
    make 0."""
    if ENGINE.get("zero_stage") == 0:
        return {"refused": refusal(lambda: accumulator(1, mixed_precision="bf16"))}
    sharded = set(ENGINE) & {"zero_stage", "fsdp"}
    gradients = []
    for dtype in ("float32", "bfloat16"):
        # Sharded engines keep a float32 master copy and make the bf16 weights themselves.
        own_weights = {"mixed_precision": "bf16"} if sharded else {}
        acc = accumulator(1, gradient_accumulation_steps=3, accumulation_dtype=dtype, **own_weights)
        probe = Probe(acc, Slope() if sharded else Slope().bfloat16())
        data = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, -256.0)]
        # Counted so that N is the number of ranks: every weight is then 1 and nothing is rounded
        # before the sum.
        for window in acc.windows(iter(data), count_targets=lambda _: 1 / 3):
            for x in window:
                with acc.accumulate(probe.model):
                    acc.backward(probe.model(x).sum(), reduction="sum")
            probe.step()
        gradients.append(probe.stepped[-1]["w"].item())
    return {"gradients": gradients}


def refusal(build: Callable[[], Any]) -> str:
    try:
        build()
    except EngineError as error:
        return str(error)
    return ""


class Branches(torch.nn.Module):
    """Two slopes; a sample's sign says which of them it uses, so a micro-batch may leave one
    without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = torch.nn.Parameter(torch.zeros(3))
        self.negative = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.positive if x.item() > 0 else self.negative).sum() * x


@case
def i27_i28_parameters_that_some_micro_batches_use() -> dict[str, Any]:
    """`positive` is used only in the first micro-batches of a window, `negative` only in the last
    ones."""
    from accelerate import DistributedDataParallelKwargs

    handlers: list[dict[str, Any]] = [{}]
    if not set(ENGINE) & {"zero_stage", "fsdp"}:
        handlers.append(
            {"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}
        )
    results = []
    tried = ([1.0, 2.0, -3.0, -5.0], [-3.0, -5.0, 1.0, 2.0], [1.0, 2.0, 4.0, 5.0])
    for values, options in itertools.product(tried, handlers):
        acc = accumulator(1, global_batch_size=4, **options)
        probe = Probe(acc, Branches())
        for window in acc.windows(
            DataLoader(torch.tensor(values), batch_size=1), count_targets=len
        ):
            for x in window:
                with acc.accumulate(probe.model):
                    acc.backward(probe.model(x).sum(), reduction="sum")
            probe.step()
        weights = probe.weights()
        everywhere = acc.engine.gather_objects({name: w.tolist() for name, w in weights.items()})
        used = [sum(v for v in values if v > 0) / 4, sum(v for v in values if v < 0) / 4]
        results.append(
            {
                "equal": all(w == everywhere[0] for w in everywhere),
                "moved": [
                    weights["positive"][0].item() / -probe.lr,
                    weights["negative"][0].item() / -probe.lr,
                ],
                "exact": used,
            }
        )
    return {"results": results}


class Thirds(torch.nn.Module):
    """As `Branches`, of several DDP buckets, and with a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = torch.nn.Parameter(torch.zeros(400_000))
        self.nobody = torch.nn.Parameter(torch.ones(2))
        self.negative = torch.nn.Parameter(torch.zeros(400_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.positive if x.item() > 0 else self.negative).sum() * x


@case
def i45_one_rank_leaves_out_what_another_uses() -> dict[str, Any]:
    """Two ranks take turns: in the last micro-batches one uses `positive`, the other `negative`;
    then nobody the latter."""
    tried = [
        [1.0, 2.0, 3.0, -5.0],
        [1.0, 2.0, 3.0, 5.0],
        [1.0, -2.0, -3.0, 5.0],
        [2.0, -4.0, 3.0, -5.0],
    ]
    if "zero_stage" in ENGINE:  # each engine takes seconds and gigabytes
        del tried[2:]
    results = []
    for policy in ("once-per-window", "every-microbatch"):
        for values in tried:
            acc = accumulator(1, global_batch_size=4, grad_sync=policy)
            probe = Probe(acc, Thirds())
            probe.optimizer.param_groups[0]["weight_decay"] = 0.5
            found = {
                "error": "",
                "moved": [],
                "exact": [sum(v for v in values if v * sign > 0) / 4 for sign in (1, -1)],
            }
            try:
                for window in acc.windows(
                    DataLoader(torch.tensor(values), batch_size=1), count_targets=len
                ):
                    for x in window:
                        with acc.accumulate(probe.model):
                            acc.backward(probe.model(x).sum(), reduction="sum")
                    acc.step(probe.optimizer)
                weights = probe.weights()
                found["moved"] = [
                    [w.min().item() / -probe.lr, w.max().item() / -probe.lr]
                    for w in weights.values()
                ]
                found["nobody"] = weights["nobody"].tolist()
            except EngineError as error:
                found["error"] = str(error)
            results.append(found)
    return {"results": results}


@case
def bf16_is_as_near_as_one_big_bf16_batch() -> dict[str, Any]:
    """Errors against float64 of our updates and of one big batch in bf16, both with the engine's
    own bf16."""
    if ENGINE.get("zero_stage") == 0:
        return {"refused": refusal(lambda: accumulator(1, mixed_precision="bf16"))}
    rows = make_rows(16)
    errors = {}
    for name, micro in (("ours", 2), ("big", 16 // world_size())):
        if "zero_stage" not in ENGINE:
            forget_accelerate()
        acc = accumulator(micro, global_batch_size=16, mixed_precision="bf16")
        probe = Probe(acc, make_model("llama"))
        exact = big_batch(probe.pristine, rows)[1]
        for window in acc.windows(rows, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
        errors[name] = relative_error(probe.stepped[-1], exact)
    return {"ours": errors["ours"], "big": errors["big"]}


@case
def i6_packed_samples() -> dict[str, Any]:
    """Samples end to end in one row, position ids that restart, no padding: the gradient of the
    padded big batch."""
    rows = make_rows(12)
    acc = accumulator(1, global_batch_size=4)
    model = make_model("llama")
    model.config.use_cache = (
        False  # with a cache transformers does not look for restarting positions
    )
    probe = Probe(acc, model)
    packed = []
    for begin in range(0, 12, 3):
        part = rows[begin : begin + 3]
        joined = {
            "input_ids": [t for row in part for t in row["input_ids"]],
            "position_ids": [i for row in part for i in range(len(row["input_ids"]))],
            # The first label of each sample would be predicted from the sample before it.
            "labels": [label for row in part for label in [IGNORE, *row["labels"][1:]]],
        }
        packed.append({key: torch.tensor([value]) for key, value in joined.items()})
    exact_loss, exact = probe.exact(rows)
    for window in acc.windows(packed[rank() :: world_size()].__iter__()):
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
        update = probe.step()
    return {
        "errors": [
            relative_error(probe.stepped[-1], exact),
            abs(update.loss - exact_loss) / exact_loss,
        ]
    }


@case
def i40_i41_packed_samples_that_see_each_other() -> dict[str, Any]:
    """A cache left on: refused for the model's own loss, exact for ours. A convolution: refused,
    then padded and exact.

    Under `train` the proof also tries what the model needs, which may raise in the midst of a
    forward.
    """
    from tests.test_packing import make

    rows = make_rows(12)
    own = [PackingCollator()(rows[begin : begin + 3]) for begin in range(0, 12, 3)][
        rank() :: world_size()
    ]

    def run(probe: Probe, windows: Any, loss: Callable[..., Any]) -> Any:
        for window in windows:
            for batch in window:
                with probe.acc.accumulate(probe.model):
                    probe.acc.backward(loss(probe.model, batch))
            return probe.step()

    def refused(model: torch.nn.Module, loss: Callable[..., Any]) -> str:
        acc = accumulator(1, global_batch_size=4)
        probe = Probe(acc, model)
        try:
            run(probe, acc.windows(iter(own)), loss)
        except DataError as error:
            return str(error)
        return ""

    messages = [refused(make_model("llama"), lambda model, batch: model(**batch).loss)]
    messages.append(refused(make("Lfm2"), causal_lm_loss))
    errors = []
    acc = accumulator(1, global_batch_size=4)
    probe = Probe(acc, make_model("llama"))
    exact = probe.exact(rows)[1]
    run(probe, acc.windows(iter(own)), causal_lm_loss)
    errors.append(relative_error(probe.stepped[-1], exact))

    acc = accumulator(3, global_batch_size=12)
    probe = Probe(acc, make("Lfm2"))
    engine, ids = acc.engine, torch.tensor(rows[2]["input_ids"])
    found = find_packing(
        engine.unwrap(probe.model),
        ids,
        most=64,
        backward=engine.runs_alone,
        agree=lambda own: worst_of(engine.gather_objects(own)),
    )
    exact = probe.exact(planned(rows, 12)[0])[1]
    run(probe, acc.windows(rows, collate_fn=pad, lengths=lengths(rows)), causal_lm_loss)
    errors.append(relative_error(probe.stepped[-1], exact))
    return {"messages": messages, "errors": errors, "reason": found.reason}


@case
def every_cut_gives_the_same_gradient() -> dict[str, Any]:
    """Padded to a multiple, packed, by a token budget, with unequal shares: errors against the
    float64 big batch, by cut."""
    rows = make_rows(37, all_masked=(3, 4, 8))
    shares = (3.0, 1.0) if world_size() == 2 else None
    cuts = {
        "multiple of 8": Cut(3, multiple=8),
        "packed": Cut(3, packed=True),
        "at most 64 tokens": Cut(max_tokens=64, cost=Cost(8.0, 0.01)),
        "at most 64 tokens, packed": Cut(max_tokens=64, packed=True),
        "shares 3:1": Cut(3, rank_weights=shares),
        "shares 3:1 of at most 64 tokens": Cut(
            max_tokens=64, rank_weights=shares, cost=Cost(8.0, 0.01)
        ),
    }
    found = {}
    for name, cut in cuts.items():
        acc = accumulator(None if cut.max_tokens else 3, global_batch_size=12)
        model = make_model("llama")
        model.config.use_cache = (
            False  # with a cache transformers does not look for restarting positions
        )
        probe = Probe(acc, model)
        cut = dataclasses.replace(cut, equal_counts=acc.engine.equal_micro_batches)
        collate = PackingCollator() if cut.packed else PaddingCollator(0, cut.multiple)
        windows = acc.windows(
            rows, collate_fn=collate, lengths=lengths(rows), cut=cut, prefetch=True
        )
        found[name] = compare(probe, windows, planned(rows, 12))
    return {"cuts": found}


@case
def r52_global_batch_that_does_not_divide() -> dict[str, Any]:
    """B_eff 10 in micro-batches of at most 4: windows of 10, 10, 10 and 7."""
    rows = make_rows(37, all_masked=(3, 4, 8))
    acc = accumulator(4, global_batch_size=10)
    probe = Probe(acc, make_model("llama"))
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows))
    return compare(probe, windows, planned(rows, 10))


@case
def combinations() -> dict[str, Any]:
    """{full, LoRA} x {float32, bf16} x checkpointing x policy: each gradient's error, and that of
    one big batch of its kind."""
    rows = make_rows(14)  # a tail window of 14 at B_eff 16: ranks hold unequal shares
    errors: dict[str, list[float]] = {}
    for kind in ("llama", "lora"):
        for precision in ("no", "bf16"):
            if precision == "bf16" and ENGINE.get("zero_stage") == 0:
                continue  # refused, and the refusal tested
            own = [
                (2, checkpointing, policy)
                for checkpointing in (False, True)
                for policy in ("once-per-window", "every-microbatch")
            ]
            for micro, checkpointing, policy in [
                (16 // world_size(), False, "once-per-window"),
                *own,
            ]:
                if "zero_stage" not in ENGINE:
                    forget_accelerate()
                model = make_model(kind)
                if checkpointing:
                    model.gradient_checkpointing_enable(
                        gradient_checkpointing_kwargs={"use_reentrant": False}
                    )
                acc = accumulator(
                    micro, global_batch_size=16, mixed_precision=precision, grad_sync=policy
                )
                probe = Probe(acc, model.train())
                exact = big_batch(make_model(kind), rows)[1]
                for window in acc.windows(rows, collate_fn=pad, lengths=lengths(rows)):
                    for batch in window:
                        with acc.accumulate(probe.model):
                            acc.backward(causal_lm_loss(probe.model, batch))
                    probe.step()
                errors.setdefault(f"{kind} {precision}", []).append(
                    relative_error(probe.stepped[-1], exact)
                )
    return {"errors_by_kind": errors}


@case
def logits_at_targets_in_chunks() -> dict[str, Any]:
    """Each path of the loss, with chunks of four targets: ranks make different numbers of chunks,
    and one makes none."""
    from peft import LoraConfig, get_peft_model

    rows = make_rows(13, all_masked=(2, 3, 8))
    head_too = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    models = {
        "llama": make_model("llama"),
        "gpt2": make_model("gpt2"),  # embeddings tied to the head
        "lora": make_model("lora"),
        "lora on the head": get_peft_model(make_model("llama"), head_too),
        "turned off": make_model("llama"),
    }
    result = {}
    before, chunked.CHUNK = chunked.CHUNK, 4 * 97
    try:
        for name, model in models.items():
            acc = accumulator(2, global_batch_size=8)
            probe = Probe(acc, model)
            if name == "turned off":
                head.decide_loss_path(probe.model, None, "off")
            found = compare(
                probe, acc.windows(rows, collate_fn=pad, shuffle=False), [rows[:8], rows[8:]]
            )
            path = head.decide_loss_path(probe.model, None).path
            result[name] = {"path": path, "errors": found["errors"] + found["loss_errors"]}
    finally:
        chunked.CHUNK = before
    return result


@case
def i22_i26_offload_by_policy() -> dict[str, Any]:
    """ZeRO with optimizer state in host memory, under both policies: the same norms and the same
    exact gradient."""
    if ENGINE.get("zero_stage", 0) not in (1, 2, 3):
        return {"norms": [], "errors": []}
    rows = make_rows(16)
    norms, errors = [], []
    for offload in (False, True):
        for policy in ("once-per-window", "every-microbatch"):
            acc = accumulator(2, global_batch_size=16, cpu_offload=offload, grad_sync=policy)
            model = make_model("llama")
            exact = big_batch(model, rows)[1]
            prepared, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
            for window in acc.windows(rows, collate_fn=pad):
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                errors.append(relative_error(acc.engine.full_gradients(prepared), exact))
                norms.append(acc.step(optimizer).grad_norm)
    return {"norms": norms, "errors": errors}


@case
def state_survives_a_round_trip() -> dict[str, Any]:
    """Three AdamW updates, everything saved and loaded into fresh objects, three more: as six
    without a stop."""
    rows = make_rows(48)
    finals = []
    for stop_after in (6, 3):
        done, saved = 0, None
        while done < 6:
            acc = accumulator(2, global_batch_size=8, max_grad_norm=1.0)
            model = make_model("llama")
            groups = [
                {"params": [p for p in model.parameters() if (p.ndim > 1) == wide]}
                for wide in (True, False)
            ]
            adam = torch.optim.AdamW(groups, lr=1e-2)
            prepared, optimizer = acc.prepare(model, adam)
            windows = acc.windows(rows, collate_fn=pad)
            if saved is not None:
                acc.engine.load_full_weights(prepared, saved[0])
                acc.engine.load_full_optimizer_state(prepared, optimizer.accelerated, saved[1])
                windows.load_state_dict(saved[2])
            for window in windows:
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                acc.step(optimizer)
                done += 1
                if done in (stop_after, 6):
                    break
            saved = (
                acc.engine.full_weights(prepared, trained_only=True),
                acc.engine.full_optimizer_state(prepared, optimizer.accelerated),
                windows.state_dict(),
            )
        assert saved is not None
        finals.append(saved[0])
    return {
        "equal": equal(*finals),
        "moved": max(
            (finals[0][n] - p).abs().max().item() for n, p in make_model("llama").named_parameters()
        ),
    }
