"""How time and memory of the operators grow with voxels, window, channels, groups and threads; full form only.

Cost has to be linear in voxels and in pairs, memory that of inputs' gradients and outputs: results.py draws both.
"""

import pytest
import torch
from tables import SCALING

from cover_kernels.measure import one_pass
from cover_kernels.problems import PASSES, Veu


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    # the quick form: the smallest of each axis
    points = {axis: found if form == "full" else found[:1] for axis, found in SCALING.items() if form != "short"}
    rows = [
        pytest.param(axis, at, problem, which, id=f"{axis}={at}-{problem}-{which}".replace(" ", "_"))
        for axis, found in points.items()
        for at, problem in found
        for which in PASSES[:2]
    ]
    metafunc.parametrize(("axis", "at", "problem", "which"), rows)


def test_scaling(axis, at, problem, which, device, timed):
    threads = torch.get_num_threads()
    series = f"{'veu' if isinstance(problem, Veu) else 'warp'} {len(problem.S)}D"
    try:
        if axis == "threads":
            torch.set_num_threads(at)
        call = one_pass(problem, problem.tensors(device), which)
        timed(call, problem, which, "cover", problem.work(which), suite="scaling", axis=axis, at=at, series=series)
    finally:
        torch.set_num_threads(threads)
