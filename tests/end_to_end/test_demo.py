"""`make demo` shows what it says: R24 (variance down by half) and R22 (peak memory does not depend
on K)."""

from __future__ import annotations

import re

import pytest

from tests.launching import ROOT, python


@pytest.mark.long
def test_r22_r24_demo(tmp_path):
    run = python(ROOT / "examples" / "demo.py", timeout=900, DEMO_FOLDER=tmp_path / "demo")
    assert run.returncode == 0, run.stderr[-3000:]
    said = r"k16: loss variance lower by (\d+)% .* against k1; at least 50% lower: yes"
    assert int(re.search(said, run.stdout)[1]) >= 50
    # At K=1 no forward finds a gradient in memory; but for that the peak is the same.
    line = re.search(
        r"peak memory +K=1 ([\d.]+) GB, K=16 ([\d.]+) GB, ([\d.]+) GB of it the gradient so far",
        run.stdout,
    )
    small, large, gradient = (float(figure) for figure in line.groups())
    assert gradient == 0.005  # 1,328,256 float32 numbers
    assert 0.99 <= (large - gradient) / small <= 1.01
    assert float(re.search(r"losses at most (\S+) apart", run.stdout)[1]) <= 1e-5
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
