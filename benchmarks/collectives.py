"""Collectives of this process, recorded with their sizes: what `traffic.py` counts.

Each passes torch's dispatcher as a `c10d::` operator with its tensors, whoever asked for it and
however: Python, the reducer in C++ that DDP runs inside the backward, DeepSpeed, asynchronous or
not. The profiler notes them. `check_counting` holds it against collectives of known sizes, and
against what a communication hook of DDP is handed. Knows no engine and no case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

W = 2  # processes of the group


@dataclass(frozen=True)
class Collective:
    """One operator and its whole buffer: what is reduced, or what all ranks hold after
    gathering."""

    name: str
    dtype: str
    numbers: int

    @property
    def bytes(self) -> int:
        return self.numbers * getattr(torch, self.dtype).itemsize

    @property
    def kind(self) -> str:
        if self.dtype != "float32" or self.numbers == 1 or self.name == "broadcast_":
            return "other"
        return "gradients" if _OPERATORS[self.name].reduces else "weights"

    @property
    def on_the_wire(self) -> float:
        """What gloo sends for it, all processes together: it reduces-and-scatters by reducing to
        all."""
        if _OPERATORS[self.name].reduces:
            return 2 * (W - 1) * self.bytes
        return (W - 1) * self.bytes


@dataclass(frozen=True)
class _Operator:
    """Which argument is the whole buffer, and how many ranks' parts it holds one of."""

    argument: int
    parts: int = 1
    reduces: bool = False


# An operator that is not here stops the benchmark: nothing passes unseen. A list of tensors to
# gather into, or to scatter from, is not recorded by the profiler; then the one tensor that is, is
# one of W.
_OPERATORS = {
    "allreduce_": _Operator(0, reduces=True),
    "allreduce_coalesced_": _Operator(0, reduces=True),
    "reduce_": _Operator(0, reduces=True),
    "_reduce_scatter_base_": _Operator(1, reduces=True),
    "reduce_scatter_": _Operator(0, W, reduces=True),
    "reduce_scatter_tensor_coalesced_": _Operator(1, reduces=True),
    "_allgather_base_": _Operator(0),
    "allgather_": _Operator(1, W),
    "allgather_into_tensor_coalesced_": _Operator(0),
    "broadcast_": _Operator(0),
    "barrier": _Operator(0, 0),
}


class Recorder:
    """`with Recorder() as seen: ...`, then `seen.collectives`: all of this process, in the order
    they were asked for."""

    def __enter__(self) -> Recorder:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )
        self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
        events = _operators(self._profile.profiler.kineto_results.experimental_event_tree())
        self.collectives = [
            _collective(event) for event in sorted(events, key=lambda event: event.start_time_ns)
        ]


def _operators(events: list[Any]) -> Iterator[Any]:
    """The outermost `c10d::` events: what is inside one is how it is done."""
    stack = list(events)
    while stack:
        event = stack.pop()
        if event.name.startswith("c10d::"):
            yield event
        else:
            stack.extend(event.children)


def _collective(event: Any) -> Collective:
    name = event.name.removeprefix("c10d::")
    if name not in _OPERATORS:
        raise RuntimeError(
            f"{event.name} is not among the operators that this benchmark counts; add it"
        )
    operator = _OPERATORS[name]
    value = event.extra_fields.inputs[operator.argument]
    tensors = value if isinstance(value, list) else [value]
    numbers = operator.parts * sum(math.prod(t.sizes) for t in tensors)
    return Collective(name, str(tensors[0].dtype).removeprefix("torch."), numbers)


def check_counting() -> None:
    """Collectives of known sizes are counted as they are, and DDP's as its communication hook is
    handed them."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    zeros = torch.zeros
    with Recorder() as seen:
        dist.all_reduce(zeros(7), async_op=True).wait()
        dist.reduce(zeros(9, dtype=torch.bfloat16), 0)
        dist.reduce_scatter_tensor(zeros(4), zeros(4 * W))
        dist.reduce_scatter(zeros(3), [zeros(3) for _ in range(W)])
        dist.all_gather_into_tensor(zeros(6 * W), zeros(6))
        dist.all_gather(
            [zeros(5, dtype=torch.float64) for _ in range(W)], zeros(5, dtype=torch.float64)
        )
        dist.broadcast(zeros(11), 0)
        with dist._coalescing_manager(async_ops=True) as together:  # noqa: SLF001 - torch has no public name
            dist.all_reduce(zeros(13))
            dist.all_reduce(zeros(14))
        together.wait()
    sizes = [
        ("float32", 7),
        ("bfloat16", 9),
        ("float32", 4 * W),
        ("float32", 3 * W),
        ("float32", 6 * W),
    ]
    sizes += [("float64", 5 * W), ("float32", 11), ("float32", 27)]
    assert [(c.dtype, c.numbers) for c in seen.collectives] == sizes, seen.collectives

    handed: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, and these would be strings
        handed.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    # 5 x 3 + 3 = 18 numbers, and 3 x 1000 + 1000; buckets of a few hundred bytes are two from the
    # second exchange on.
    layers = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1000))
    model = DistributedDataParallel(layers, bucket_cap_mb=0.0002)
    model.register_comm_hook(None, hook)
    for _ in range(2):
        handed.clear()
        with Recorder() as seen:
            model(torch.ones(2, 5)).sum().backward()
    reduced = [c.numbers for c in seen.collectives if c.kind == "gradients"]
    assert reduced == handed and sum(reduced) == 18 + 4000 and len(reduced) > 1, (reduced, handed)
