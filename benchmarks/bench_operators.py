"""veu, warp and compose beside their peers, in one process and run: `pytest bench_operators.py -k "veu and eager"`.

Everything is compared with the reference in float64 before it is timed; what cannot be timed is listed with its reason.
"""

import pytest
from peers import COMPILING, PEERS, Unable, check, peer
from tables import OPERATORS, operators

from cover_kernels.measure import one_pass
from cover_kernels.problems import BOTH, FORWARD, PASSES


def pytest_generate_tests(metafunc):
    form, device = (metafunc.config.getoption(name) for name in ("form", "device"))
    rows = [
        pytest.param(problem, which, who, id=f"{problem}-{which}-{who}".replace(" ", "_"))
        for problem in operators(form, device)
        for which in (PASSES if form == "full" else (FORWARD, BOTH))
        for who in ("cover", *PEERS[type(problem)])
    ]
    metafunc.parametrize(("problem", "which", "who"), rows)


def test_operator(problem, which, who, form, device, timed, left_out):
    if who in COMPILING and form != "full":
        left_out(problem, which, who, "compiles for up to minutes: only in the full form")
    if who in COMPILING and device == "cpu" and problem not in OPERATORS["short"]:
        left_out(problem, which, who, "compiles for up to minutes: only at the sizes of the short form")
    try:
        candidate = peer(who, problem, device)
        check(candidate, problem, device, which)
        call = one_pass(candidate.function, problem.tensors(device), which)
    # what torch, its compiler and the packages say where they lack something: a backward on a CPU, memory
    except (Unable, RuntimeError, NotImplementedError, ValueError) as reason:
        if who == "cover":
            raise
        left_out(problem, which, who, reason)
    timed(call, problem, which, who, problem.work(which), suite="operators")
