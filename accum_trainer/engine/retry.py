"""Whether a rank alone can run a micro-batch again that ran out of memory. The exchanges that its
engine makes in one forbid it: the other ranks would wait for them, or make them twice."""

from __future__ import annotations

from typing import Any

from accum_trainer.engine.sync import ONCE

LOWER = "lower the micro-batch (the effective batch stays)"


def retry_blocker(engine: Any, is_last: bool) -> str:
    """Why not, with the remedy; "" if it can.

    Args:
        engine: an `Engine`, whose capabilities decide.
        is_last: the micro-batch is the last of its window.
    """
    if not engine.runs_alone:
        return (
            f"{engine.name} gathers weights from all processes in every forward, so none can run "
            f"one alone; {LOWER}"
        )
    if engine.equal_micro_batches:
        return (
            f"with grad_sync={engine.grad_sync} {engine.name} reduces each micro-batch on all "
            f"processes, and the other processes wait for its gradients; {LOWER}, or use "
            f"grad_sync={ONCE}"
        )
    if is_last and engine.reduces_in_last_backward:
        return (
            "it is the last of its window, whose backward exchanges gradients with the other "
            f"processes; {LOWER}, or use recover_from_oom=always, which exchanges after it"
        )
    return ""
