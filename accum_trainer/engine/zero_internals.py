"""DeepSpeed's private state, as far as an engine of ours has to check, replace or clear it.

Knows DeepSpeed's private names; no window, and no engine of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from accum_trainer.errors import EngineError


def check_internals(sharded: Any, stage: int, names: Sequence[str]) -> None:
    """Raise an EngineError on all ranks if DeepSpeed's optimizer lacks one of `names`, which the
    engine of `stage` reads or writes.

    Found later, in a window that one rank drops, the others would wait for it.
    """
    # bf16 at stage 1 has another optimizer, which has none of the names and needs none.
    is_zero = type(sharded).__name__.startswith("DeepSpeedZeroOptimizer")
    missing = [name for name in names if not hasattr(sharded, name)]
    if is_zero and missing:
        raise EngineError(
            f"deepspeed {version('deepspeed')} keeps ZeRO-{stage}'s state in another way "
            f"than is known here (no {', '.join(missing)}); use deepspeed >=0.19.8,<0.21, or "
            "another engine"
        )


def hold_back_reductions(deepspeed: Any, unless: Callable[[], bool]) -> None:
    """Keep a coalesced window from reducing when it is left, `unless` it is left on purpose.

    Python also leaves one that an error cut short, when it cleans up: the other ranks do not take
    part then.
    """
    for name in ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3"):
        flush = getattr(deepspeed, name, None)
        if flush is not None:
            setattr(deepspeed, name, lambda *args, flush=flush: flush(*args) if unless() else None)


@contextlib.contextmanager
def before_overflow_is_dropped(sharded: Any, look: Callable[[], None]) -> Iterator[None]:
    """Have a step of DeepSpeed's optimizer call `look` when it has found, with all ranks, that the
    gradient is not finite, before it drops it."""
    has_looked = False

    def looking(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_looked
            if sharded.overflow and not has_looked:
                has_looked = True
                look()
            return method(*args, **kwargs)

        return call

    # Called after the verdict: in ZeRO's optimizers, and in that of bf16 at stage 1, which clears
    # twice.
    names = [name for name in ("_update_scale", "clear_hp_grads") if hasattr(sharded, name)]
    for name in names:
        setattr(sharded, name, looking(getattr(sharded, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(sharded, name)


def forget_forwards_alone() -> None:
    """Clear ZeRO-3's record of which weights each module may release.

    It learns them for good from the first passes that it sees. Passes without a backward, such as
    the proof of the loss path, teach it to release all, and each backward would gather every weight
    anew (a cache that outlives its trace: partitioned_param_coordinator.py, __params_to_release).
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    remembered = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # noqa: SLF001 - the cache has no public name
    # DeepSpeed's timing decorator lies around the cache.
    for cell in getattr(remembered, "__closure__", None) or ():
        getattr(cell.cell_contents, "cache_clear", lambda: None)()
