"""The rows of the operators' table that run in Triton's interpreter."""

from dataclasses import replace

import torch
from operators import CASES, DTYPES, OPERATORS, Case

# of veu, more channels than a thread holds: a group in two chunks, and in three, the last one incomplete
MORE = (
    Case("groups of 40 channels and mask", (2, 4), B=1, channels=40, heads=2, mask="random"),
    Case("64 channels", (2, 3), B=1, channels=64),
)

# several groups; several blocks of voxels; a scatter in which many voxels meet
PAIRED = {
    operator: next(case for case in CASES[operator] if case.why == why)
    for operator, why in (
        ("veu", "groups and mask"),
        ("warp", "row longer than a segment"),
        ("compose", "row longer than a segment"),
    )
}


def small(operator, case, dtype=torch.float32):
    """A case that takes seconds at most: an operation costs the interpreter the same whatever its lanes do.

    In float32 few rows and slices; for veu one image, and channels for several blocks, one of them incomplete. In other
    dtypes, on which only loads, stores and the type of sums depend, one tile or block of voxels and few channels.
    """
    short = dtype != torch.float32
    if operator != "veu":
        S = (*case.S[:-1], min(case.S[-1], 16))
        return replace(case, S=S, B=min(case.B, 1), channels=min(case.channels, 2)) if short else case
    rows = (2, 2 if short else 3) if len(case.S) == 3 else (3 if short else 4,)
    B = min(case.B, 2 if case.mask and case.heads > 1 and not short else 1)
    S = tuple(map(min, case.S, (*rows, 9 if short else 70)))
    return replace(case, S=S, B=B, channels=min(case.channels, 3 if short else 11))


def table():
    """(operator, case, dtype) of all that is run."""
    for operator in OPERATORS:
        for case in CASES[operator]:
            for dtype in DTYPES:
                yield operator, small(operator, case, dtype), dtype
    for case, dtype in zip(MORE, (torch.float32, torch.bfloat16), strict=True):
        yield "veu", case, dtype
