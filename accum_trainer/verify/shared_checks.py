"""Checks that do not depend on who trains: can the loss be cut, was dropout off, do ranks agree.

Knows the float64 reference and the engine's exchange of objects; no training and no loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from accum_trainer.engine.base import Engine
from accum_trainer.verify.big_batch import BigBatch, Row, num_targets, relative_error
from accum_trainer.verify.report import FAIL, INFO, Check, measured

# Relative difference between a batch's gradient and the sum of its rows': models compute some of a
# float64 forward in float32.
SEPARABLE_TOLERANCE = 1e-6
_SEPARABLE_ROWS = 8
_BATCH_NORMS = (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm,
)


def dropout_check(modules: int) -> Check:
    found = f"{modules} modules" if modules else "the model has none"
    return Check("dropout", INFO, f"dropout off for the comparison: {found}")


def separability_check(exact: BigBatch, rows: Sequence[Row]) -> Check:
    """Is the gradient of a batch the sum of its rows' gradients, in float64 and train mode?

    If not, no cut into micro-batches can give the big batch's update, whichever loop makes it.
    """
    some = [row for row in rows if num_targets(row)][:_SEPARABLE_ROWS]
    if len(some) < 2:
        return Check(
            "separable loss", INFO, "one row with targets only: there is nothing to separate"
        )
    whole, again = exact.truth(some, len(some)), exact.truth(some, len(some))
    random = relative_error(again.gradient, whole.gradient)
    if not random <= SEPARABLE_TOLERANCE:
        meaning = (
            "the model draws random numbers besides dropout, so no two passes agree and "
            "nothing can be compared"
        )
        return Check("separable loss", FAIL, meaning, random, SEPARABLE_TOLERANCE)
    error = relative_error(exact.truth(some, 1).gradient, whole.gradient)
    return measured(
        "separable loss",
        error,
        SEPARABLE_TOLERANCE,
        f"a batch of {len(some)} rows has the sum of its rows' gradients, so it can be cut "
        "anywhere",
        f"not separable: {_coupling(exact.model)}; no cut into micro-batches gives the big batch's "
        "update",
    )


def _coupling(model: torch.nn.Module) -> str:
    """Why the rows of a batch depend on each other."""
    norms = [name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)]
    if norms:
        return (
            f"{len(norms)} BatchNorm modules ({', '.join(norms[:3])}) take statistics over the "
            "micro-batch; use LayerNorm or GroupNorm, or freeze them in eval mode"
        )
    return (
        "the rows of a batch depend on each other (an in-batch loss such as in-batch "
        "negatives, or a batch-wide routing)"
    )


def unequal_names(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ between ranks in any bit; the same list on all ranks.
    Collective."""
    digests = {
        name: hashlib.blake2b(
            t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).digest()
        for name, t in tensors.items()
    }
    ranks = engine.gather_objects(digests)
    names = {name for rank in ranks for name in rank}
    return sorted(name for name in names if len({rank.get(name) for rank in ranks}) > 1)
