"""The harness bites: seeded faults in the CUDA sources, each of which must be caught by values or by a sanitizer.

A mutant is one replacement in one source. It is compiled for one dtype alone, float32 unless it is in the kernels on
tensor cores, and replays recorded calls in a process of its own, since it may well crash.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import build, missing, of_types, sources
from cuda_on_cpu.harness import replay
from operators import CASES, CUDA_CASES
from test_cuda_on_cpu import expected, run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SIZES = ("-DCOVER_VEU_SIZES(X)=X(8,5)", "-DCOVER_VEU_MMA_SIZES(X)=X(32,5)X(32,7)")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Mutant:
    why: str
    file: str
    old: str
    new: str
    operator: str
    case: str  # of operators.CASES or CUDA_CASES
    variant: str = "plain"  # plain: the values must give it away
    deterministic: bool = True

    @property
    def dtype(self):
        return "bf16" if self.file == "veu_fwd_mma.cu" else "f32"

    def __str__(self):
        return self.why.replace(" ", "-")


MUTANTS = [
    Mutant(
        "no barrier before shared memory is written",
        "veu.cuh",
        "__syncthreads();  // nobody reads what was there any more",
        "",
        "veu",
        "groups",
        "thread",
    ),
    Mutant(
        "no barrier before shared memory is read",
        "veu.cuh",
        "slab + row * row_stride + at);\n  }\n  __syncthreads();",
        "slab + row * row_stride + at);\n  }",
        "veu",
        "groups",
        "thread",
    ),
    Mutant("a key beyond the far border", "veu.cuh", "x + at < g.W", "x + at <= g.W", "veu", "groups"),
    Mutant("no tail guard", "veu.cuh", "return inside(g) && my_x + i < g.W", "return inside(g)", "veu", "groups"),
    Mutant(
        "threads that skip a barrier",
        "veu_fwd.cu",
        "A mean[d][Cut::Q] = {};",
        "A mean[d][Cut::Q] = {}; if (!tile.inside(g)) continue;",
        "veu",
        "groups",
    ),
    Mutant("key mask forgotten", "veu.cuh", "(!mask || mask[voxel])", "true", "veu", "groups and mask"),
    Mutant(
        "a line of the wrong width",
        "veu.cuh",
        "lines + c * Cut::width, other",
        "lines + c * Cut::span, other",
        "veu",
        "groups",
    ),
    Mutant(
        "a position beyond the slab",
        "veu.cuh",
        "i < Cut::slab_rows * Cut::width",
        "i <= Cut::slab_rows * Cut::width",
        "veu",
        "groups",
        "address",
    ),
    Mutant(
        "an offset beyond the window",
        "veu_fwd.cu",
        "g.R[2] - ox + 1",
        "g.R[2] - ox + 2",
        "veu",
        "window of several chunks",
    ),
    Mutant("swapped axes", "veu_fwd.cu", "decay + row * oy", "decay + row * ox", "veu", "window wider than image"),
    Mutant("scale without log2(e)", "veu_fwd.cu", "a.scale * kLog2e", "a.scale", "veu", "groups"),
    Mutant("sum not rescaled", "veu_fwd.cu", "sum[q] * decay + row", "sum[q] + row", "veu", "volume"),
    Mutant(
        "queries seen from the wrong side",
        "veu_bwd.cu",
        "outer[i + n] - g[i + n]",
        "outer[i + n] + g[i + n]",
        "veu",
        "groups",
    ),
    Mutant(
        "no barrier before the keys make room",
        "veu_fwd_mma.cu",
        "__syncthreads();  // nobody reads keys any more",
        "",
        "veu",
        "tensor cores, window wider than image",
        "thread",
    ),
    Mutant(
        "a column of the window's other side",
        "veu_fwd_mma.cu",
        "n < Cut::columns - 1 && n < query_x",
        "n < Cut::columns - 1 && n <= query_x",
        "veu",
        "tensor cores, groups and mask",
    ),
    Mutant(
        "a row of keys beyond the window",
        "veu_fwd_mma.cu",
        "(my_row + n) * 4",
        "(my_row + n + 1) * 4",
        "veu",
        "tensor cores, groups and mask",
    ),
    Mutant(
        "products that start without the bias",
        "veu_fwd_mma.cu",
        "s == 0 ? bias :",
        "s == 1 ? bias :",
        "veu",
        "tensor cores, groups and mask",
    ),
    Mutant(
        "planes not rescaled",
        "veu_fwd_mma.cu",
        "share[e].sum * decay + row",
        "share[e].sum + row",
        "veu",
        "tensor cores, volume, groups and mask",
    ),
    Mutant(
        "a query beyond the last row",
        "veu_fwd_mma.cu",
        "my_y >= g.H ||",
        "my_y > g.H ||",
        "veu",
        "tensor cores, window wider than image",
        "address",
    ),
    Mutant("delta of one group for several", "veu_bwd.cu", "a.J > 1", "a.J > 3", "veu", "groups"),
    Mutant(
        "a masked key gets a gradient",
        "veu_bwd.cu",
        "of == Of::queries || !image_mask",
        "true || !image_mask",
        "veu",
        "groups and mask",
    ),
    Mutant(
        "a corner outside the image",
        "sample.cuh",
        "at >= 0 && at < size",
        "at >= 0 && at <= size",
        "warp",
        "one voxel wide",
    ),
    Mutant(
        "a term is lost",
        "sums.cuh",
        "atomicAdd(sums + i, term);",
        "sums[i] += term;",
        "warp",
        "odd sizes",
        "thread",
        False,
    ),
    Mutant(
        "thread beyond the image",
        "warp.cu",
        "p < numel; p += items()",
        "p <= numel; p += items()",
        "warp",
        "odd sizes",
        "address",
    ),
    Mutant("half-pixel centres forgotten", "sample.cuh", "(p + A(0.5)) /", "p /", "warp", "coarser flow"),
    Mutant(
        "gradient without the stride",
        "warp.cu",
        "static_cast<A>(g.stride[3 - d + i]) * grad",
        "grad",
        "warp",
        "coarser flow",
    ),
    Mutant(
        "displacement of another level",
        "compose.cu",
        "(g.stride[3 - d + i]) * up",
        "(1) * up",
        "compose",
        "coarser flow",
    ),
    Mutant(
        "strides in the wrong order",
        "compose.cu",
        "g.stride[3 - d + i]) * load",
        "g.stride[2 - i]) * load",
        "compose",
        "volume, anisotropic stride",
    ),
]


@cache
def recorded(operator, case, deterministic, dtype):
    """(calls of a case, forward and backward, their outputs on the sources as they are)."""
    case = next(c for c in (*CASES[operator], *CUDA_CASES[operator]) if c.why == case)
    function, tensors, grad, _, _ = expected(operator, case, DTYPES[dtype])
    calls = run(function, tensors, grad, deterministic=deterministic)[1].calls
    done = replay(build("plain", of_types(sources(), dtype), SIZES), calls)
    assert done.returncode == 0, done.stderr
    return calls, done.outputs


def differ(outputs, expected):
    pairs = [pair for o, e in zip(outputs, expected, strict=True) for pair in zip(o, e, strict=True)]
    # the bits of a bfloat16 are the same in every schedule
    same = (np.array_equal(a, b) if a.dtype == np.uint16 else np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
    return not all(same)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant):
    csrc = of_types(sources(), mutant.dtype)
    path = f"cuda/{mutant.file}"
    assert mutant.old in csrc[path]
    csrc[path] = csrc[path].replace(mutant.old, mutant.new)
    calls, outputs = recorded(mutant.operator, mutant.case, mutant.deterministic, mutant.dtype)
    done = replay(build(mutant.variant, csrc, SIZES), calls, mutant.variant)
    if mutant.variant == "plain":
        assert done.returncode or differ(done.outputs, outputs)
    else:
        assert done.returncode and "Sanitizer" in done.stderr


def test_sources_as_they_are_pass_the_same_checks():
    for operator, case, deterministic, dtype in {(m.operator, m.case, m.deterministic, m.dtype) for m in MUTANTS}:
        calls, outputs = recorded(operator, case, deterministic, dtype)
        folder = build("plain", of_types(sources(), dtype), SIZES)
        for schedule in ("reverse", "random"):
            again = replay(folder, calls, schedule=schedule)
            assert not differ(again.outputs, outputs)
