"""A data file of many rows is read and trained on in bounded memory: benchmarks/many_rows.py."""

from __future__ import annotations

import pytest

from benchmarks.many_rows import measure

ROWS = 200_000


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Of a million rows the peak is the same, and 58 MB stay instead of 12 (measured by the
    benchmark). Rows kept as objects of Python would take 95 MB here."""
    few, many = measure(2000, tmp_path / "few"), measure(ROWS, tmp_path / "many")
    assert many["reading_mb"] - few["reading_mb"] < 150, (few, many)
    assert (many["training_mb"] - few["training_mb"]) * 1e6 / ROWS < 150, (few, many)
