"""The Triton kernels without a GPU: interpreted under an address checker, and compiled for GPUs that are not there.

Both happen in a process of their own (triton_interpreted.py, triton_compiled.py), once; the tests look at the results.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import OPERATORS, assert_close, grad_like, run, sample_inputs
from triton_cases import PAIRED, small, table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


def results_of(script, folder, **environment):
    """What a script of this folder saved."""
    path = folder / "results.pt"
    environment = {"COVER_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder), **environment}
    command = [sys.executable, str(HERE / script), str(path)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return results_of("triton_interpreted.py", tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return results_of("triton_compiled.py", tmp_path_factory.mktemp("compiled"), TRITON_INTERPRET="0")


@pytest.mark.parametrize(("operator", "case", "dtype"), list(table()), ids=str)
def test_agrees_with_reference_and_touches_only_its_memory(interpreted, operator, case, dtype):
    function, tensors = sample_inputs(operator, case, dtype)
    exact_function, _ = sample_inputs(operator, case, torch.float64)
    exact_tensors = [t.double() for t in tensors]
    grad = grad_like(exact_function(*exact_tensors))
    exact = run(exact_function, exact_tensors, "reference", grad)
    same = run(function, tensors, "reference", grad)
    for name, actual in interpreted[operator, case.why, dtype].items():
        assert not isinstance(actual, str), f"{name}: {actual}"
        assert [t.dtype for t in actual] == [t.dtype for t in same]
        assert_close(actual, same, exact)


def test_every_access_was_checked(interpreted):
    assert interpreted["accesses"] > 1_000_000


@pytest.mark.parametrize(("forward", "backward"), [("triton", "cpu"), ("cpu", "triton")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_pairs_with_the_cpu(interpreted, operator, forward, backward):
    function, tensors = sample_inputs(operator, small(operator, PAIRED[operator]), torch.float32)
    exact = [t.double() for t in tensors]
    grad = grad_like(function(*exact))
    expected, same = (run(function, t, "reference", grad) for t in (exact, tensors))
    assert_close(interpreted["pairs", operator, forward, backward], same, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_results_do_not_depend_on_the_order_of_programs(interpreted, operator):
    assert interpreted["order", operator]


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("out_of_bounds", "load out of bounds: element 31 of x, which has 27"),
        ("before_the_start", "program 0: load "),
        ("overlapping_tiles", "race: store of y[7] with writer 0"),
        ("reads_its_neighbours_result", "race: store of x[8] with reader 0"),
        ("scatters_without_atomics", "race: two lanes store to one element of y"),
        ("adds_to_what_is_empty", "atomic of y[0], which nobody wrote"),
        ("leaves_a_tail", "1 of 27 elements of [27] never written"),
        ("undefined_lanes", "a masked load without `other`"),
    ],
)
def test_the_checker_reports_bad_kernels(interpreted, kernel, report):
    assert report in interpreted[kernel]


def test_the_checker_reports_nothing_else(interpreted):
    assert interpreted["nothing_wrong"] == ""


def test_holds_what_the_operators_promise():
    """The tests of the operators themselves on the interpreter: of identities to the bit, of what is not finite, and of
    raw calls that are refused."""
    promises = (
        "identity_to_the_bit or non_finite or nan or clamped or composing_with_zero or masked_keys or large_scores "
        "or not_fit"
    )
    # the interpreter itself takes denormal bfloat16 numbers for 0
    promises = f"triton and ({promises}) and not (identity_to_the_bit and bfloat16)"
    files = [str(HERE / f"test_{name}.py") for name in (*OPERATORS, "operators")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", promises, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "COVER_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_compiles_for_every_target(compiled):
    kernels = {"_veu_fwd", "_veu_grad_q", "_veu_grad_k", "_warp_fwd", "_warp_bwd", "_compose_fwd", "_compose_bwd"}
    for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert kernels <= {kernel for at, _, kernel in compiled if at == target}


def test_nothing_spills_and_denormal_numbers_are_kept(compiled):
    for (target, case, kernel), usage in compiled.items():
        if usage is None:
            continue  # AMD: there is no tool at hand that tells
        assert usage["stack"] == 0, (target, case, kernel, usage)
        if "veu" not in kernel:
            # a denormal number must come through an identity
            assert not usage["ftz"], (target, case, kernel, usage)
