"""Build an accumulator on the engine under test, and see its averaged gradient at each step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from accum_trainer import Accumulator, causal_lm_loss
from accum_trainer.window_plan import global_order, windows_of
from tests.reference import big_batch, num_targets, relative_error

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


def _with_scaler(**options: Any) -> tuple[Accumulator, torch.amp.GradScaler]:
    """An Accumulator under fp16's loss scaler; the scaler runs on the CPU too, accelerate just
    never makes one there."""
    from accelerate import Accelerator

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    return accumulator(2, global_batch_size=8, accelerator=accelerator, **options), scaler
