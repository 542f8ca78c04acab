"""Long grids: some of their points run in `make test`, all of them in `make test-long` besides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], keep: Iterable[Any]) -> list[Any]:
    """Each value as a parameter; those not in `keep` carry the marker `long`.

    `keep` names one value of each situation that the code distinguishes, and the caller says which
    situations these are.
    """
    values, keep = list(values), list(keep)
    unknown = [value for value in keep if value not in values]
    if unknown:
        raise ValueError(f"{unknown} are not in the grid {values}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in keep else [pytest.mark.long],
        )
        for value in values
    ]
