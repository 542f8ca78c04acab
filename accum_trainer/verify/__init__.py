"""Proof, on the user's own model, data and engine, that K micro-batches on W ranks give the
one-big-batch update.

    from accum_trainer.verify import Subject, verify

    report = verify(Subject.of(assemble(config)))
    assert report.passed

The real loop runs a few real windows. Each is compared with the definition: the gradient of one big
batch, computed in one process on the CPU in float64 from the plain model (`big_batch`), without
this package's losses, weights or cuts. In 16 bits the error of one big batch is itself measured on
the same rows, and bounds that of the windows (`tolerance`). Nothing is written.

`training` checks a training of this package; `loop` checks a user's own loop on plain Accelerate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accum_trainer.verify.training import Subject as Subject
    from accum_trainer.verify.training import verify as verify

__all__ = ["Subject", "verify"]


def __getattr__(name: str) -> Any:  # lazily, so that importing one module of this room stays light
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from accum_trainer.verify.training import Subject, verify

    return {"Subject": Subject, "verify": verify}[name]
