"""R25: memory after many updates is that after 100; benchmarks/memory_over_time.py, real runs of
each kind."""

from __future__ import annotations

import pytest

from benchmarks.memory_over_time import KINDS, measure


def check(points, growth):
    """Resident memory within `growth` of that after 100 updates at each later point; of Python's
    objects not one more for each two updates."""
    first, last = points[0], points[-1]
    for point in points[1:]:
        assert point["rss"] < first["rss"] * (1 + growth), points
    assert 2 * (last["objects"] - first["objects"]) < last["step"] - first["step"], points


@pytest.mark.parametrize("kind, growth", [("single", 0.0025), ("ddp", 0.01)])
@pytest.mark.long
def test_memory_does_not_grow(tmp_path, kind, growth):
    for points in measure(kind, tmp_path, most=400)[0]:
        check(points, growth)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_r25_memory_after_2000_updates(tmp_path, kind):
    """With two processes 0.5 to 2.5 MB of 460 come in the first half, of torch and its heap; after
    that nothing may come."""
    for points in measure(kind, tmp_path)[0]:
        check(points, 0.01)
        half, last = points[len(points) // 2], points[-1]  # between them garbage comes and goes
        check([half, last], 0.004)
