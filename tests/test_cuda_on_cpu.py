"""The CUDA sources, run on the CPU (cuda_on_cpu): values against the float64 reference in three schedules, limits of a
launch, and the sanitizers."""

from contextlib import nullcontext
from functools import cache

import numpy as np
import operators
import pytest
import torch
from cuda_on_cpu.build import build, missing
from cuda_on_cpu.harness import SCHEDULES, Harness, replay
from cuda_on_cpu.rewrite import rewrite
from operators import CASES, CUDA_CASES, DTYPES, Case, assert_close, grad_like, sample_inputs

import cover_kernels

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PARAMETERS = [(o, case) for o in operators.OPERATORS for case in (*CASES[o], *CUDA_CASES[o])]


def run(function, tensors, grad, *, deterministic=True, **harness):
    """([output, gradients...], the harness) of a function of leaf tensors. Outputs are allocated full of NaN."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Harness(**harness) as ran:
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    return [y.detach(), *grads], ran


@cache
def expected(operator, case, dtype):
    """Function, tensors and gradient of a case, and what the reference makes of them in this dtype and in float64."""
    function, tensors = sample_inputs(operator, case, dtype)
    exact_tensors = [t.double() for t in tensors]
    grad = grad_like(function(*exact_tensors))
    same = operators.run(function, tensors, "reference", grad)
    return function, tensors, grad, same, operators.run(function, exact_tensors, "reference", grad)


@cache
def forward_schedule(operator, case, dtype, deterministic=True):
    """([output, gradients...], calls) of a case in the first schedule."""
    function, tensors, grad, _, _ = expected(operator, case, dtype)
    results, ran = run(function, tensors, grad, deterministic=deterministic)
    return results, ran.calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), PARAMETERS, ids=str)
def test_agrees_with_reference_in_every_schedule(operator, case, dtype):
    function, tensors, grad, same, exact = expected(operator, case, dtype)
    results = [run(function, tensors, grad, schedule=schedule)[0] for schedule in SCHEDULES[1:]]
    results.insert(0, forward_schedule(operator, case, dtype)[0])
    assert_close(results[0], same, exact)
    # the same bits, whatever the order of blocks and threads
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("forward", "backward"), [(Harness, nullcontext), (nullcontext, Harness)])
@pytest.mark.parametrize(
    ("operator", "why", "dtype"),
    [
        ("veu", "groups and mask", torch.float32),
        ("veu", "no valid key", torch.float16),
        ("veu", "tensor cores, groups and mask", torch.bfloat16),
        ("warp", "volume, anisotropic stride", torch.bfloat16),
        ("compose", "volume, anisotropic stride", torch.float64),
    ],
)
def test_pairs_with_the_cpu(operator, why, dtype, forward, backward):
    """What one backend's forward saves serves the other's backward."""
    case = next(c for o, c in PARAMETERS if (o, c.why) == (operator, why))
    function, tensors, grad, same, exact = expected(operator, case, dtype)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with forward():
        y = function(*leaves)
    with backward():
        grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    assert_close([y.detach(), *grads], same, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["warp", "compose"])
def test_atomics_agree_with_reference(operator, dtype):
    for case in CASES[operator]:
        function, tensors, grad, same, exact = expected(operator, case, dtype)
        assert_close(forward_schedule(operator, case, dtype, False)[0], same, exact)
        for schedule in SCHEDULES[1:]:
            assert_close(run(function, tensors, grad, deterministic=False, schedule=schedule)[0], same, exact)


@pytest.mark.parametrize(("operator", "case"), [(o, c) for o, c in PARAMETERS if "tile" in c.why or "odd" in c.why])
def test_more_work_than_a_launch_may_have_blocks(operator, case):
    function, tensors, grad, _, _ = expected(operator, case, torch.float32)
    few, many = run(function, tensors, grad, max_blocks=2)[0], run(function, tensors, grad)[0]
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize(
    ("channels", "width", "dtype"), [(16, 9, torch.float32), (64, 9, torch.bfloat16), (64, 12, torch.bfloat16)]
)
def test_keys_that_take_no_part_may_hold_anything(channels, width, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, channels, 6, width, generator=generator).to(dtype)
    mask = torch.rand(1, 1, 6, width, generator=generator) < 0.6
    grad = torch.ones(1, 2, 6, width)
    wild = torch.where(mask, k, torch.tensor(float("nan"), dtype=dtype))
    for window in (5, 9):  # a kernel of its own, and the general one

        def function(q, k, window=window):
            return cover_kernels.veu(q, k, window, heads=2, mask=mask)

        expected = run(function, (q, torch.where(mask, k, 0)), grad)[0]
        for a, e in zip(run(function, (q, wild), grad)[0], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize(("scale", "architecture"), [(-0.2, 90), (0.0, 90), (None, 75)])
def test_calls_that_tensor_cores_do_not_serve(scale, architecture):
    case = Case("of the size of a kernel on tensor cores", (5, 18), channels=32, heads=2)
    _, tensors = sample_inputs("veu", case, torch.bfloat16)

    def function(q, k):
        return cover_kernels.veu(q, k, 3, heads=2, scale=scale)

    exact_tensors = [t.double() for t in tensors]
    grad = grad_like(function(*exact_tensors))
    same, exact = (operators.run(function, t, "reference", grad) for t in (tensors, exact_tensors))
    assert_close(run(function, tensors, grad, architecture=architecture)[0], same, exact)


def test_too_little_shared_memory_is_a_clear_error():
    q = torch.randn(1, 32, 4, 4)
    with pytest.raises(RuntimeError, match=r"veu: a block needs \d+ bytes of shared memory, the device has 20000"):
        run(lambda q, k: cover_kernels.veu(q, k, 3), (q, q), torch.ones(1, 2, 4, 4), max_shared=20000)


def test_half_types_of_the_harness_round_as_those_of_torch():
    module = Harness().module
    bits = np.arange(1 << 16, dtype=np.uint16)
    generator = np.random.default_rng(0)
    # all magnitudes from below the smallest float16 to beyond the largest; bfloat16's neighbours of them
    values = generator.standard_normal(20000) * 2.0 ** generator.integers(-30, 18, 20000)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        numbers = torch.from_numpy(bits).view(dtype).float()
        np.testing.assert_array_equal(module.from_bits(name, bits), numbers.numpy())
        # with the ties between any two neighbours
        ties = torch.cat([torch.from_numpy(values).float(), (numbers[:-1] + numbers[1:]) / 2, numbers])
        ties = ties[~ties.isnan()]
        rounded = module.to_bits(name, ties.numpy())
        np.testing.assert_array_equal(rounded, ties.to(dtype).view(torch.uint16).numpy())


def test_rewriting_keeps_lines_and_finds_template_arguments():
    source = "a;\nf<T, decltype(d)::value><<<n, dim3(8, 4),\n  0, s>>>(x, y);\nextern __shared__ float4 m[];\n"
    assert rewrite(source) == (
        "a;\ncuda_on_cpu::launch(f<T, decltype(d)::value>, {n, dim3(8, 4),\n  0, s}, x, y);\n"
        "auto* m = cuda_on_cpu::dynamic_shared<float4>();\n"
    )
    assert rewrite("__shared__ A t[8][N + 1];") == "auto& t = cuda_on_cpu::shared<A[8][N + 1]>(__COUNTER__);"


@cache
def all_calls():
    """Every call of the matrix above, forward and backward, in every dtype and with sums of both kinds."""
    calls = []
    for operator, case in PARAMETERS:
        for dtype in DTYPES:
            for deterministic in (True,) if operator == "veu" else (True, False):
                calls += forward_schedule(operator, case, dtype, deterministic)[1]
    return calls


# the order of threads changes what ThreadSanitizer may see, but no address
@pytest.mark.parametrize(("variant", "schedule"), [("address", "random"), ("thread", "reverse"), ("thread", "random")])
def test_sanitizers_find_nothing(variant, schedule):
    done = replay(build(variant), all_calls(), variant, schedule)
    assert done.returncode == 0, done.stderr[-4000:]
