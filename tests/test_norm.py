"""The norm that gradients are clipped by: float64 sums, and no memory to speak of."""

from __future__ import annotations

import math

import torch

from accum_trainer.engine.step import square_sums
from tests.launching import script


def test_i46_squares_add_up_in_float64_whatever_the_layout():
    torch.manual_seed(0)
    large = torch.randn(3000, 3001)
    gradients = [
        large,
        large.t(),
        large[:, ::2],
        torch.randn(5),
        torch.tensor(3.0),
        torch.randn(7, 2).bfloat16(),
    ]
    for gradient, found in zip(gradients, square_sums(gradients), strict=True):
        exact = math.fsum((gradient.double().numpy() ** 2).ravel())
        assert abs(found / exact - 1) < 1e-12
    assert square_sums([]) == [0.0]
    assert math.isinf(square_sums([torch.tensor([1.0, math.inf])])[0])


def test_i46_norm_of_a_large_gradient_takes_no_copy_of_it(tmp_path):
    """0.2 GB; a copy in float64 is 0.4 GB. In a process that does nothing else meanwhile."""
    done = script(NORM_OF_A_LARGE_GRADIENT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 0.1


NORM_OF_A_LARGE_GRADIENT = """
import torch
from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak
from accum_trainer.engine.step import square_sums
cpu = torch.device("cpu")
gradient = torch.ones(50_000_000)
square_sums([gradient[:1000]])
reset_peak(cpu)
before = memory_gb(cpu)
assert square_sums([gradient]) == [50_000_000.0]
print(peak_gb(cpu) - before)
"""
