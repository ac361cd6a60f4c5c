"""Runs the operators' table in Triton's interpreter, under the address checker, and saves what came out.

    TRITON_INTERPRET=1 python triton_interpreted.py RESULTS

A process of its own: Triton decides when it is imported whether kernels are compiled or interpreted. RESULTS (see
torch.save) is a dict: (operator, case, dtype) -> {"deterministic", "fast": [output, gradients...] or an error's text};
("pairs", operator, forward, backward) -> [output, gradients...] of two backends; ("order", operator) -> whether
programs in another order gave the same bits; the name of a kernel that is wrong on purpose -> the checker's report;
and "accesses", how many were checked.
"""

import sys
from unittest import mock

import torch
import triton
import triton.language as tl
from operators import OPERATORS, grad_like, run, sample_inputs
from triton_cases import PAIRED, small, table
from triton_checker import Violation, checked

import cover_kernels
import cover_kernels.triton
from cover_kernels.triton import common


def pair(function, tensors, forward, backward, grad=None):
    """[output, gradients...] of two backends, without a request for determinism."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with cover_kernels.use_backend(forward):
        y = function(*leaves)
    grad = grad_like(y) if grad is None else grad
    with cover_kernels.use_backend(backward):
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def results(operator, case, dtype):
    function, tensors = sample_inputs(operator, case, dtype)
    with cover_kernels.use_backend("cpu"):
        grad = grad_like(function(*tensors))
    ways = {"deterministic": lambda: run(function, tensors, "triton", grad)}
    if operator != "veu":
        ways["fast"] = lambda: pair(function, tensors, "triton", "triton", grad)
    found, accesses = {}, 0
    for name, way in ways.items():
        try:
            with checked() as checker:
                found[name] = way()
        except (Violation, triton.runtime.errors.InterpreterError) as error:
            found[name] = str(error)
        accesses += checker.accesses
    return found, accesses


def same_in_another_order(function, tensors):
    """Whether programs that run in another order give the same bits, where determinism is asked for."""
    first = run(function, tensors, "triton")
    with mock.patch.object(common, "GRID_WIDTH", 2):
        second = run(function, tensors, "triton")
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton.jit
def out_of_bounds(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def before_the_start(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i - 1, mask=i < n, other=0), mask=i < n)


@triton.jit
def overlapping_tiles(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def reads_its_neighbours_result(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < n, other=0), mask=i < n)
    tl.store(y + i, 0.0, mask=i < n)


@triton.jit
def scatters_without_atomics(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def adds_to_what_is_empty(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def leaves_a_tail(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n - 1)


@triton.jit
def undefined_lanes(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def nothing_wrong(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


def report(kernel):
    """What the checker says of a kernel that copies 27 numbers, in blocks of 8."""
    try:
        with checked():
            kernel[(4,)](torch.randn(27), torch.empty(27), 27, 8)
    except (Violation, triton.runtime.errors.InterpreterError) as error:
        return str(error)
    return ""


BAD = (
    out_of_bounds,
    before_the_start,
    overlapping_tiles,
    reads_its_neighbours_result,
    scatters_without_atomics,
    adds_to_what_is_empty,
    leaves_a_tail,
    undefined_lanes,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    common.GRID_WIDTH = 5  # so that the second axis of the grid, and programs beyond the last, are met as well
    found = {kernel.fn.__name__: report(kernel) for kernel in (*BAD, nothing_wrong)}
    found["accesses"] = 0
    for operator, case, dtype in table():
        found[operator, case.why, dtype], accesses = results(operator, case, dtype)
        found["accesses"] += accesses
    for operator in OPERATORS:
        inputs = sample_inputs(operator, small(operator, PAIRED[operator]), torch.float32)
        for forward, backward in (("triton", "cpu"), ("cpu", "triton")):
            found["pairs", operator, forward, backward] = pair(*inputs, forward, backward)
        found["order", operator] = same_in_another_order(*inputs)
    torch.save(found, sys.argv[1])
