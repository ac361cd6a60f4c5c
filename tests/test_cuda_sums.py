"""Deterministic gradients of the CUDA kernels: the same bits in any order of the threads; what is not finite stays NaN.

The kernels run on the CPU (tests/cuda_on_cpu).
"""

import pytest
import torch
from cuda_on_cpu.harness import Harness
from operators import CASES, grad_like, sample_inputs
from test_cuda_on_cpu import pytestmark  # noqa: F401  where the harness cannot run

from cover_kernels import warp


def grads(function, tensors, schedule, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    with Harness(schedule):
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, grad(y))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["warp", "compose"])
def test_same_bits_in_every_order_of_the_threads(deterministic, operator, dtype):
    case = next(c for c in CASES[operator] if c.why == "coarser flow")
    function, tensors = sample_inputs(operator, case, dtype)
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first, *others = (
        grads(function, tensors, s, lambda y: grad_like(y) + noise[: y.numel()].view_as(y).to(y))
        for s in ("forward", "reverse", "random")
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_nan_where_it_is_added_and_nowhere_else(deterministic, value, dtype):
    x, flow = torch.randn(1, 1, 4, 5, dtype=dtype), torch.full((1, 2, 4, 5), 0.5, dtype=dtype)
    grad = torch.ones(1, 1, 4, 5, dtype=dtype)
    grad[0, 0, 1, 2] = value
    found = grads(lambda a: warp(a, flow), [x], "random", lambda y: grad)[0]
    reached = torch.zeros(4, 5, dtype=torch.bool)
    reached[1:3, 2:4] = True
    assert torch.equal(found[0, 0].isnan(), reached)
    grad[0, 0, 1, 2] = 1
    clean = grads(lambda a: warp(a, flow), [x], "random", lambda y: grad)[0]
    assert torch.equal(found[0, 0][~reached], clean[0, 0][~reached])
