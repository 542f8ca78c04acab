"""Windows in which memory runs out at a chosen point, on one process or several, and what a test
judges of them.

python -m tests.recovering OUT CASE ...        (under torchrun; one JSON per rank)
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from accum_trainer import Accumulator, EngineError, causal_lm_loss
from accum_trainer.losses.head import decide_loss_path
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.speed.batch_size import Memory, find_batch_size
from tests.engine.cases import probing
from tests.engine.cases.probing import Probe, accumulator, lengths, planned, rank, world_size
from tests.reference import big_batch, make_model, make_rows, pad, relative_error

# Where a micro-batch can fail, in the order it gets there. Gradients are made from the head down.
POINTS = ("forward", "loss", "backward begins", "in backward", "backward ends", "after backward")
B, K, LR = 4, 3, 0.1
LAST = -1
# (window, number of the micro-batch that the loop is given, those given again counted too, or LAST)
# -> point
Failures = dict[tuple[int, int], str]


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


def run_micro_batch(
    acc: Accumulator, model: torch.nn.Module, batch: Any, point: str | None
) -> None:
    """One forward and backward, which runs out of memory at `point`."""
    layers = next(module.layers for module in model.modules() if hasattr(module, "layers"))
    decide_loss_path(model, batch["input_ids"])  # its forwards are not the ones that shall fail
    with contextlib.ExitStack() as stack:
        if point == "forward":
            stack.callback(layers[1].register_forward_pre_hook(out_of_memory).remove)
        if (
            point == "in backward"
        ):  # head and second layer have their gradients, the first layer has not

            def fail_on_the_way_back(module: Any, inputs: Any, output: torch.Tensor) -> None:
                output.register_hook(out_of_memory)

            stack.callback(layers[0].register_forward_hook(fail_on_the_way_back).remove)
        if point == "backward ends":
            first = next(
                module for module in model.modules() if isinstance(module, torch.nn.Embedding)
            )
            stack.callback(first.weight.register_post_accumulate_grad_hook(out_of_memory).remove)
        loss = causal_lm_loss(model, batch)
        if point == "loss":
            out_of_memory()
        if point == "backward begins":
            loss.register_hook(out_of_memory)
        acc.backward(loss, reduction="sum")
        if point == "after backward":
            out_of_memory()


@cache
def exact_run(batch: int, whole_windows: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradient of each window as one float64 big batch, of a float64 run of plain gradient
    descent."""
    model = make_model("llama").double()
    found = []
    for rows in planned(_rows(batch, whole_windows), batch):
        found.append(big_batch(model, rows))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= LR * found[-1][1][name]
    return found


def _rows(batch: int, whole_windows: int) -> list[dict]:
    return make_rows(batch * whole_windows + 5)


def train(
    failures: Failures, ranks: tuple[int, ...] = (0,), whole_windows: int = 1, **options: Any
) -> dict[str, Any]:
    """Whole windows of K micro-batches on each rank, then a tail, with failures on `ranks`."""
    batch = B * K * world_size()
    rows = _rows(batch, whole_windows)
    acc = accumulator(B, global_batch_size=batch, **options)
    probe = Probe(acc, make_model("llama"), lr=LR)
    due = dict(failures) if rank() in ranks else {}
    result: dict[str, Any] = {"errors": [], "updates": [], "given": [], "left": 0}
    windows = acc.windows(rows, collate_fn=pad, lengths=lengths(rows))
    for index, (window, (loss, gradient)) in enumerate(
        zip(windows, exact_run(batch, whole_windows), strict=True)
    ):
        given = []
        for number, part in enumerate(window):
            given.append(len(part["input_ids"]))
            with acc.accumulate(probe.model):
                last = LAST if acc.window.micro_batch.is_last else number  # type: ignore[union-attr]
                run_micro_batch(
                    acc, probe.model, part, due.pop((index, number), due.pop((index, last), None))
                )
        update = probe.step()
        result["errors"] += [
            relative_error(probe.stepped[-1], gradient),
            abs(update.loss - loss) / loss,
        ]
        result["given"].append(given)
        # Also a backward that DeepSpeed believes to be under way.
        result["left"] += probe.left() + getattr(
            getattr(probe.model, "optimizer", None), "_backward_active_depth", 0
        )
        counted = [
            update.num_samples,
            update.num_splits,
            update.num_micro_batches,
            update.gradient_accumulation_steps,
        ]
        result["updates"].append([*counted, len(window)])
    assert not due, f"never came to {due}"
    return result | {"run": acc.num_micro_batches}


def refusal(failures: Failures, **options: Any) -> str:
    try:
        train(failures, ranks=tuple(range(world_size())), **options)
    except EngineError as error:
        return str(error)
    return ""


def everywhere(
    ranks_of: tuple[tuple[int, ...], ...], numbers: range, **options: Any
) -> dict[str, Any]:
    return {
        f"{point} of {number} on {ranks}": train({(0, number): point}, ranks, **options)
        for point in POINTS
        for number in numbers
        for ranks in ranks_of
    }


# --- on two processes ---

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


@contextlib.contextmanager
def engine(**options: Any) -> Iterator[None]:
    probing.ENGINE.update(options)
    try:
        yield
    finally:
        probing.ENGINE.clear()
        _fresh()


@case
def undisturbed() -> Any:
    return {policy: train({}, recover_from_oom=policy) for policy in ("never", "auto", "always")}


RANKS = ((0,), (1,), (0, 1))  # one alone, the other, both


@case
def ddp_always() -> Any:
    """Anywhere in a window; each point and each place in the window on every choice of ranks once,
    as in a Latin square."""
    found = {}
    for place, point in enumerate(POINTS):
        for number in range(K):
            ranks = RANKS[(place + number) % len(RANKS)]
            result = train({(0, number): point}, ranks, recover_from_oom="always")
            found[f"{point} of {number} on {ranks}"] = result
    return found


@case
def ddp_always_on_all() -> Any:
    """The whole grid of it."""
    return everywhere(RANKS, range(K), recover_from_oom="always")


@case
def ddp_auto() -> Any:
    """In all but a window's last; once one failed, in the last of the next window too."""
    return everywhere(((0,), (1,)), range(K - 1)) | {"next": _learned()}


def _learned() -> Any:
    return train({(0, 0): "forward", (1, LAST): "in backward"}, (1,), whole_windows=2)


@case
def ddp_again_and_again() -> Any:
    """The first fails, then one of its halves, then the last."""
    failures = {(0, 0): "forward", (0, 1): "backward ends", (0, LAST): "loss"}
    return {"": train(failures, (1,), recover_from_oom="always")}


@case
def ddp_with_unused_parameters() -> Any:
    from accelerate import DistributedDataParallelKwargs

    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return {point: train({(0, LAST): point}, (1,), kwargs_handlers=handlers) for point in POINTS}


@case
def zero1() -> Any:
    with engine(zero_stage=1):
        found = everywhere(((1,),), range(1, K - 1)) | {"next": _learned()}
        return found | {
            f"last, {p}": train({(0, LAST): p}, (0,), recover_from_oom="always") for p in POINTS
        }


@case
def zero2() -> Any:
    with engine(zero_stage=2):
        return everywhere(((1,),), range(1, K), grad_sync="once-per-window")


@case
def refusals() -> Any:
    found = {
        "ddp, last": refusal({(0, LAST): "forward"}),
        "ddp, every-microbatch": refusal({(0, 0): "forward"}, grad_sync="every-microbatch"),
        "ddp, every-microbatch, always": refusal(
            {(0, 0): "forward"}, grad_sync="every-microbatch", recover_from_oom="always"
        ),
    }
    for name, options, number, more in (
        ("zero0", {"zero_stage": 0}, 0, {}),
        ("zero1, last", {"zero_stage": 1}, LAST, {}),
        ("zero2, every-microbatch", {"zero_stage": 2}, 0, {"grad_sync": "every-microbatch"}),
        ("zero3", {"zero_stage": 3}, 0, {}),
        ("fsdp2", {"fsdp": True}, 0, {}),
    ):
        with engine(**options):
            found[name] = refusal({(0, number): "forward"}, **more)
    return found


class MadeUpMemory(Memory):
    """100 kB and `per_sample` for each sample of the last batch that was collated; memory runs out
    above `most`."""

    def __init__(self, room: float, per_sample: float = 10e3, most: float = float("inf")) -> None:
        self.room, self.per_sample, self.most = room, per_sample, most
        self.sizes: list[int] = []

    def collate(self, samples: list[Any]) -> Any:
        self.sizes.append(len(samples))
        return PaddingCollator(0)(samples)

    def in_use(self) -> float:
        return 100e3

    def begin(self) -> None:
        pass

    def peak(self) -> float:
        if self.sizes[-1] > self.most:
            out_of_memory()
        return 100e3 + self.per_sample * self.sizes[-1]

    def limit(self, processes: int) -> float:
        return self.room


def fitted(fits: int, out_of_memory_on: int | None = None) -> dict[str, Any]:
    """Search where rank 1 alone has room for `fits` samples only, or a rank's memory runs out
    above; then a window."""
    batch = B * K * world_size()
    acc = accumulator(B, global_batch_size=batch)
    probe = Probe(acc, make_model("llama"), lr=LR)
    reserve = float(
        acc.engine.all_gather_floats(
            [acc.engine.optimizer_bytes(probe.optimizer.accelerated)]
        ).max()
    )
    memory = MadeUpMemory(105e3 + 10e3 * fits + reserve)
    if out_of_memory_on is not None:
        memory.room = 1e9
        memory.most = fits if rank() == out_of_memory_on else memory.most
    elif rank() == 0:
        memory.per_sample = 1.0
    before = acc.engine.rng_state()["torch"]
    found = find_batch_size(
        acc.engine, probe.model, probe.optimizer, memory.collate, 16, 12, memory
    )
    untouched = bool(torch.equal(before, acc.engine.rng_state()["torch"])) and probe.left() == 0
    window = next(iter(acc.windows(_rows(batch, 1), collate_fn=pad)))
    for part in window:
        with acc.accumulate(probe.model):
            run_micro_batch(acc, probe.model, part, None)
    update = probe.step()
    loss, gradient = exact_run(batch, 1)[0]
    return {
        "found": [found.micro_batch_size, found.max_tokens],
        "reserve": reserve,
        "untouched": untouched,
        "errors": [relative_error(probe.stepped[-1], gradient), abs(update.loss - loss) / loss],
    }


@case
def fits() -> Any:
    found = {"ddp": fitted(5), "ddp, out of memory on one rank": fitted(5, out_of_memory_on=1)}
    for stage in (2, 3):
        with engine(zero_stage=stage):
            found[f"zero{stage}"] = fitted(5)
    with engine(zero_stage=2):
        found["zero2, out of memory on one rank"] = fitted(5, out_of_memory_on=0)
    with engine(fsdp=True):
        found["fsdp2"] = fitted(5)
    return found


@case
def one_rank_alone_is_refused() -> Any:
    """Ends the launch: the other rank waits in the exchange."""
    return train({(0, LAST): "forward"}, (1,))


def _fresh() -> None:
    from accelerate.state import AcceleratorState, GradientState

    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate sets it for good
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(out: str, *names: str) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name in names:
        _fresh()
        gc.freeze()  # each failure collects garbage, which would go through all that was imported
        print(
            f"case {name}", file=sys.stderr, flush=True
        )  # a case that hangs is the last one named
        results[name] = CASES[name]()
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"rank{rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
