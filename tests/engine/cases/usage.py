"""Parameters that some micro-batches or ranks leave out, or that are frozen later."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer import EngineError, causal_lm_loss
from tests.engine.cases.probing import ENGINE, Probe, accumulator, case, planned, world_size
from tests.reference import make_model, make_rows, pad, relative_error


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
def a_model_that_the_last_micro_batch_leaves_out() -> dict[str, Any]:
    """Two models in a loop: y = b(a(x)), then y = b(x). By hand, with weights and inputs of 1 and
    four such samples, the mean over them of dy/da is 1/2, and of dy/db (2 + 1) / 2."""
    if "zero_stage" in ENGINE:
        return {}  # takes one model
    found: dict[str, Any] = {}
    for policy in ("once-per-window", "every-microbatch"):
        acc = accumulator(1, gradient_accumulation_steps=2, grad_sync=policy)
        a, b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            for layer in (a, b):
                layer.weight.fill_(1.0)
        sgd = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
        a, b, sgd = acc.prepare(a, b, sgd)
        try:
            for window in acc.windows(torch.ones(2 * world_size(), 2), count_targets=len):
                for i, x in enumerate(window):
                    with acc.accumulate(a, b):
                        y = b(a(x)) if i == 0 else b(x)
                        acc.backward(y.sum(), reduction="sum")
                acc.step(sgd)
            found[policy] = [
                acc.engine.full_weights(m)["weight"].flatten().tolist() for m in (a, b)
            ]
        except EngineError as error:
            found[policy] = str(error)
    return found
