"""The proof of the Triton kernels bites: seeded faults, each of which the interpreter must show in values, or the
address checker report.

A mutant is one replacement in one source of cover_kernels/triton. All run in one process (triton_mutants.py).
"""

from dataclasses import dataclass

import pytest
from test_triton import pytestmark, results_of  # noqa: F401  where triton is not installed


@dataclass(frozen=True)
class Mutant:
    why: str
    file: str
    old: str
    new: str
    problem: str  # of triton_mutants.PROBLEMS

    def __str__(self):
        return self.why.replace(" ", "-")


MUTANTS = [
    Mutant("a key beyond the far border", "veu", "(x + o < W)", "(x + o <= W)", "groups and mask"),
    Mutant("a row of keys beyond the window", "veu", "tl.abs(key_y - y) <= RY", "tl.abs(key_y - y) >= 0", "volume"),
    Mutant("an offset beyond the window", "veu", "& (o <= RX)", "", "window of several turns"),
    Mutant("no tail guard", "veu", "here = (y < H) & (x < W)", "here = y < H", "groups and mask"),
    Mutant(
        "a stride of another axis", "veu", "(tl.cast(z, tl.int64) * H + y)", "(tl.cast(z, tl.int64) * W + y)", "volume"
    ),
    Mutant("swapped axes", "veu", "m_y * decay + row_total * (key_y - y)", "m_y * decay + row_moment", "volume"),
    Mutant("scale without log2(e)", "veu", "scale, ACC) * LOG2E", "scale, ACC)", "groups and mask"),
    Mutant("sum not rescaled", "veu", "total * decay + row_total", "total + row_total", "volume"),
    Mutant("another group's channels", "veu", "(b * J + j) * C * P", "(b + j) * C * P", "groups and mask"),
    Mutant("another image's mask", "veu", "mask += b * P", "mask += 0", "groups and mask"),
    Mutant("queries seen from the wrong side", "veu", "- g_x * (first + i)", "+ g_x * (first + i)", "groups and mask"),
    Mutant("another group's delta", "veu", "delta + group * P + i", "delta + b * P + i", "groups and mask"),
    Mutant("a masked key's gradient left out", "veu", "here & ~taken", "here & taken", "groups and mask"),
    Mutant("delta from every chunk", "veu", "if chunk == 0:", "if chunk >= 0:", "several chunks"),
    Mutant("the chunk at hand once more", "veu", "tl.where(i < chunk * BLOCKS, i, i + BLOCKS)", "i", "several chunks"),
    Mutant("channels of the first chunk", "veu", "c = (chunk * len(blocks) + i)", "c = i", "several chunks"),
    Mutant("a corner outside the image", "common", "(axis[0] + BIT < size)", "(axis[0] + BIT <= size)", "warp"),
    Mutant("a voxel beyond the last", "common", "voxel, voxel < P", "voxel, voxel <= P", "warp"),
    Mutant("a program beyond the last", "warp", "if index >= programs:", "if index > programs:", "warp"),
    Mutant("half-pixel centres forgotten", "common", "p + 0.5, tl", "p, tl", "warp, coarser flow"),
    Mutant("gradient without the stride", "warp", "total * tl.cast(stride, ACC)", "total", "warp, coarser flow"),
    Mutant("a fine voxel left out", "warp", "range(2 * SX - SX % 2)", "range(2 * SX - 1)", "warp, coarser flow"),
    Mutant(
        "sums without atomics",
        "common",
        'tl.atomic_add(sums + at, number, mask=valid, sem="relaxed")',
        "tl.store(sums + at, tl.load(sums + at, mask=valid, other=0) + number, mask=valid)",
        "warp, coarser flow",
    ),
    Mutant("another channel's scale", "warp", "exponents, b * C + c", "exponents, b * C", "warp, deterministic"),
    Mutant(
        "no mark of what is not finite",
        "common",
        'tl.store(out + at, float("nan")',
        "tl.store(out + at, 0.0",
        "warp, deterministic",
    ),
    Mutant("displacement of another level", "compose", "strides[a + 3 - d] * sample", "sample", "compose"),
    Mutant("strides in the wrong order", "compose", "strides[a + 3 - d] * grad", "strides[2 - a] * grad", "compose"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return results_of("triton_mutants.py", tmp_path_factory.mktemp("mutants"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(reports, mutant):
    assert reports[mutant.why]


def test_sources_as_they_are_pass_the_same_checks(reports):
    assert {problem: reports[problem] for problem in {mutant.problem for mutant in MUTANTS}} == {
        problem: "" for problem in {mutant.problem for mutant in MUTANTS}
    }
