"""What ranks exchange, how often, and what one finds wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer import DataError, causal_lm_loss
from accum_trainer.window_plan import global_order
from benchmarks.grad_sync import counting
from tests.engine.cases.probing import (
    ENGINE,
    Probe,
    accumulator,
    case,
    compare,
    lengths,
    planned,
    rank,
    world_size,
)
from tests.reference import make_model, make_rows, pad, relative_error


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


@case
def rows_that_the_last_rank_has_longer() -> dict[str, Any]:
    """Rows 1 and up are of other lengths there, so that it would deal a window differently."""
    rows = make_rows(24)
    is_other = world_size() > 1 and rank() == world_size() - 1
    found = [{k: v[: 2 + i % 3] for k, v in row.items()} for i, row in enumerate(rows)]
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    # The one sample that all ranks compare is the same.
    first = int(global_order(len(rows), 0, 0)[0])
    own = [*rows[:first], found[first], *rows[first + 1 :]] if is_other else found
    try:
        for window in acc.windows(own, collate_fn=pad):
            for batch in window:
                with acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
            probe.step()
    except DataError as error:
        return {"updates": acc.num_updates, "raised": str(error)}
    return {"updates": acc.num_updates, "raised": ""}


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
