"""The rows of the operators' table that run in Triton's interpreter."""

from dataclasses import replace

import torch
from operators import CASES, DTYPES, OPERATORS

# every dtype where something depends on it, float32 elsewhere
ALL_DTYPES = ("one voxel", "channels last", "coarser flow")

# several groups; several blocks of voxels; a scatter in which many voxels meet
PAIRED = {
    operator: next(case for case in CASES[operator] if case.why == why)
    for operator, why in (
        ("veu", "groups and mask"),
        ("warp", "row longer than a segment"),
        ("compose", "row longer than a segment"),
    )
}


def small(operator, case):
    """A case that takes seconds at most. For veu, an operation costs the interpreter the same whatever its lanes do:
    few rows and slices, and channels for several blocks, one of them incomplete."""
    if operator != "veu":
        return case
    limits = (2, 3, 70) if len(case.S) == 3 else (4, 70)
    B = min(case.B, 2 if case.mask and case.heads > 1 else 1)
    return replace(case, S=tuple(map(min, case.S, limits)), B=B, channels=min(case.channels, 11))


def table():
    """(operator, case, dtype) of all that is run."""
    for operator in OPERATORS:
        for case in CASES[operator]:
            for dtype in DTYPES if case.why in ALL_DTYPES else (torch.float32,):
                yield operator, small(operator, case), dtype
