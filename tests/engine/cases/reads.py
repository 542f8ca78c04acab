"""Reads of a tensor's value on the host, each of which waits for a GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from accum_trainer import causal_lm_loss
from accum_trainer.sources.collating import PackingCollator
from tests.engine.cases.probing import Probe, accumulator, case, world_size
from tests.reference import make_model, make_rows, pad

# Operators whose result, or its size, the host needs. `.item()`, `float()`, `bool()`, `if` are
# the first.
_OPERATORS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave.Tensor"),
)
# Methods that copy to the host below the dispatcher's sight.
_METHODS = ("tolist", "cpu")


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        indices = args[1] if name == "aten::index" else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if name in _OPERATORS or by_mask:
            self.found[f"{name} from {_caller()}"] += 1
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _METHODS:
            self.found[f"{function.__name__} from {_caller()}"] += 1
        return function(*args, **(kwargs or {}))


class Reads:
    """Count what reads a value inside, by who asked for it.

    On a CPU nothing waits and all tensors are on the host, so this counts the calls that would
    wait on a GPU. It takes reads of tensors that are on the host anywhere for such calls too; code
    that means the host's copy of a batch reads it through numpy, which neither mode sees. It sees a
    backward because that runs in the calling thread on a CPU; not what C++ reads by itself, nor
    copies that a GPU alone makes: `benchmarks/gpu/waits.py` counts those on one.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        self._modes = (_Operators(self.found), _Methods(self.found))
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _caller() -> str:
    """The innermost frames outside torch."""
    frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
    return " < ".join(
        f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in reversed(frames[-3:])
    )


def _mean(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def _count(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


LOSSES: dict[str, Any] = {
    "causal_lm_loss": (causal_lm_loss, {}, None),
    "own": (lambda model, batch: model(**batch).loss, {}, None),
    "user's sum": (
        lambda model, batch: _mean(model, batch) * batch["labels"].numel(),
        {"reduction": "sum"},
        None,
    ),
    "user's mean": (_mean, {"reduction": "mean"}, _count),
}


@case
def host_reads() -> dict[str, Any]:
    return _reads_of([*(("padded", name) for name in LOSSES), ("packed", "causal_lm_loss")])


@case
def host_reads_of_packed_batches() -> dict[str, Any]:
    return _reads_of([("packed", name) for name in LOSSES if name != "causal_lm_loss"])


def _reads_of(asked: list[tuple[str, str]]) -> dict[str, Any]:
    """In the micro-batches and in the step of a second window, by layout and loss path; one
    micro-batch of the padded ones has no target."""
    found: dict[str, Any] = {}
    for layout, name in asked:
        loss, said, counted = LOSSES[name]
        acc = accumulator(2, global_batch_size=8 * world_size(), max_grad_norm=1.0)
        model = make_model("llama")
        model.config.use_cache = False
        probe = Probe(acc, model)
        # In the second window, which is the one that is looked at: the first proves the loss.
        begin = 8 * world_size() + 2
        masked = tuple(range(begin, begin + 4)) if layout == "padded" else ()
        rows = make_rows(16 * world_size(), all_masked=masked)
        collate = pad if layout == "padded" else PackingCollator()
        windows = acc.windows(rows, collate_fn=collate, count_targets=counted, shuffle=False)
        for window in windows:
            inside: Counter[str] = Counter()
            for batch in window:
                with Reads() as read, acc.accumulate(probe.model):
                    acc.backward(loss(probe.model, batch), **said)
                inside += read
            with Reads() as in_step:
                acc.step(probe.optimizer)
        found[f"{layout}, {name}"] = {"inside": inside, "step": in_step}
    return found
