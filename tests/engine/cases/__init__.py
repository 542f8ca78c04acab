"""One contract, run on every engine: each case trains something small and returns numbers that a
test can judge.

Every case compares with an independent reference (one float64 big batch, or arithmetic by hand). It
runs in one process or in each of several, and must not know in how many: B and K are given for the
effective batch it names.
"""

from tests.engine.cases import (  # noqa: F401 - importing a module registers its cases
    curves,
    cuts,
    exactness,
    exchange,
    gathers,
    loops,
    losses,
    noise,
    precision,
    reads,
    state,
    step,
    usage,
    windows,
)
from tests.engine.cases.probing import CASES, ENGINE, OF_ACCELERATE

__all__ = ["CASES", "ENGINE", "OF_ACCELERATE"]
