"""What holds for every operator: agreement of the backends, gradients, registration, compilation, determinism."""

import os
import subprocess
import sys
from itertools import product

import operators
import pytest
import torch
from operators import CASES, DTYPES, OPERATORS, PARAMETERS, assert_close, grad_like, run, sample_inputs
from torch import zeros
from torch.autograd import forward_ad

import cover_kernels
from cover_kernels.checks import check_raw
from cover_kernels.measure import peak_above

BACKENDS = operators.compiled_backends()
EVERY_BACKEND = [*BACKENDS, "reference"]


def test_the_compiled_backend_is_there():
    assert torch.device(operators.DEVICE).type in BACKENDS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), PARAMETERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_agrees_with_reference(backend, operator, case, dtype):
    function, tensors = sample_inputs(operator, case, dtype)
    exact_function, exact_tensors = sample_inputs(operator, case, torch.float64)
    exact_tensors = [t.double() for t in tensors]
    grad = grad_like(exact_function(*exact_tensors))
    exact = run(exact_function, exact_tensors, "reference", grad)
    same = run(function, tensors, "reference", grad)
    actual = run(function, tensors, backend, grad)
    assert [t.dtype for t in actual] == [t.dtype for t in same]
    assert_close(actual, same, exact)


def smooth_case(operator, case):
    """float64 inputs in which no position lies on the border of a cell, where a derivative does not exist."""
    function, tensors = sample_inputs(operator, case, torch.float64)
    generator = torch.Generator("cpu").manual_seed(2)
    if operator == "veu":
        return function, tensors
    noise = [torch.rand(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device) for t in tensors]
    moved = [t + 0.03 + 0.05 * n for t, n in zip(tensors, noise, strict=True)]
    return function, moved


@pytest.mark.parametrize(
    ("operator", "case"), [(o, c) for o, c in PARAMETERS if c.B and max(c.S) < 20 and c.layout == "contiguous"], ids=str
)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_gradcheck(backend, operator, case):
    function, tensors = smooth_case(operator, case)
    tensors = [t.requires_grad_() for t in tensors]
    with cover_kernels.use_backend(backend):
        # on a GPU the atomics of warp and compose add up in another order in every run
        options = {
            "fast_mode": True,
            "atol": 1e-6,
            "rtol": 1e-4,
            "nondet_tol": 0 if operators.DEVICE == "cpu" else 1e-12,
        }
        assert torch.autograd.gradcheck(function, tensors, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_forward_pairs_with_any_backward(operator):
    function, tensors = sample_inputs(operator, CASES[operator][-4], torch.float32)
    expected = run(function, tensors, "reference")
    for forward in EVERY_BACKEND:
        for backward in EVERY_BACKEND:
            leaves = [t.clone().requires_grad_() for t in tensors]
            with cover_kernels.use_backend(forward):
                y = function(*leaves)
            with cover_kernels.use_backend(backward):
                grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            for actual, wanted in zip([y, *grads], expected, strict=True):
                torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivative_is_a_clear_error(operator):
    function, tensors = sample_inputs(operator, CASES[operator][2], torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator} can be differentiated once"):
        torch.autograd.grad(first[0].square().sum(), tensors)


RAW = {
    "veu": (zeros(1, 8, 9, 10), zeros(1, 8, 9, 10), [3, 3], 2, 1.0, None),
    "warp": (zeros(1, 3, 8, 8), zeros(1, 2, 4, 4), [2, 2], False, False),
    "compose": (zeros(1, 2, 4, 4), zeros(1, 2, 8, 8), [2, 2]),
}
SHAPE, DTYPE = (f"does not have the {what} that the others ask for" for what in ("shape", "dtype"))
AXES, POSITIVE = "expected a number for each axis", "expected numbers above 0 for the axes"
# what the Python functions refuse with names, a call of the registered operator must not read beyond its tensors for
MISFITS = [
    ("veu", 0, zeros(1, 8, 9), r"expected \[B, C, \*S\] with 2 or 3 spatial axes"),
    ("veu", 0, zeros(1, 8, 0, 10), "expected no empty axis"),
    ("veu", 1, zeros(1, 8, 1, 1), f"k {SHAPE}"),
    ("veu", 1, zeros(1, 4, 9, 10), f"k {SHAPE}"),
    ("veu", 1, zeros(1, 8, 9, 10).double(), f"k {DTYPE}"),
    ("veu", 2, [3], AXES),
    ("veu", 2, [3, 4], "expected an odd window"),
    ("veu", 2, [3, -1], POSITIVE),
    ("veu", 3, 3, "the heads do not divide the channels"),
    ("veu", 3, 0, "the heads do not divide the channels"),
    ("veu", 5, torch.ones(1, 1, 9, 9, dtype=torch.bool), f"mask {SHAPE}"),
    ("veu", 5, zeros(1, 1, 9, 10), f"mask {DTYPE}"),
    ("warp", 1, zeros(1, 2, 4, 3), f"flow {SHAPE}"),
    ("warp", 1, zeros(1, 2, 4, 4).half(), f"flow {DTYPE}"),
    ("warp", 2, [2], AXES),
    ("warp", 2, [0, 2], POSITIVE),
    ("compose", 0, zeros(1, 2, 3, 4), f"flow {SHAPE}"),
    ("compose", 0, zeros(1, 3, 4, 4), f"flow {SHAPE}"),
    ("compose", 1, zeros(1, 3, 8, 8), f"residual {SHAPE}"),
    ("compose", 2, [3, 2], "the stride does not divide the spatial shape"),
]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("operator", "position", "value", "message"), MISFITS)
def test_a_raw_call_that_does_not_fit_is_refused(backend, operator, position, value, message):
    forward = getattr(torch.ops.cover_kernels, f"{operator}_fwd")
    arguments = [a.to(operators.DEVICE) if isinstance(a, torch.Tensor) else a for a in RAW[operator]]
    with cover_kernels.use_backend(backend):
        forward(*arguments)
        arguments[position] = value.to(operators.DEVICE) if isinstance(value, torch.Tensor) else value
        with pytest.raises(RuntimeError, match=f"{operator}: {message}"):
            forward(*arguments)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_raw_call_with_integers_does_not_fit_and_is_refused(backend, operator):
    arguments = [a.int() if isinstance(a, torch.Tensor) else a for a in RAW[operator]]
    arguments = [a.to(operators.DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    with cover_kernels.use_backend(backend), pytest.raises(RuntimeError, match="tensors must be float64, float32,"):
        getattr(torch.ops.cover_kernels, f"{operator}_fwd")(*arguments)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_raw_backward_that_does_not_fit_is_refused(backend, operator):
    _, arguments = raw_arguments(operator, CASES[operator][1])
    backward = getattr(torch.ops.cover_kernels, f"{operator}_bwd")
    with cover_kernels.use_backend(backend):
        backward(*arguments)
        for i, tensor in enumerate(arguments):
            if isinstance(tensor, torch.Tensor):
                for misfit in (tensor[..., :-1], tensor.half()):
                    with pytest.raises(RuntimeError, match=f"{operator}: .* that the others ask for"):
                        backward(*arguments[:i], misfit, *arguments[i + 1 :])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_raw_call_of_two_devices_does_not_fit_and_is_refused(operator):
    """The check itself: with a meta tensor, dispatch would take the fake kernel, and a GPU is not everywhere."""
    function = getattr(torch.ops.cover_kernels, f"{operator}_fwd").default
    arguments = dict(zip([a.name for a in function._schema.arguments], RAW[operator], strict=True))
    check_raw(function._opname, arguments)
    other = {"veu": "k", "warp": "flow", "compose": "flow"}[operator]
    with pytest.raises(RuntimeError, match=f"{operator}: {other} is not on the device of the others"):
        check_raw(function._opname, arguments | {other: arguments[other].to("meta")})


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_derivative_is_a_clear_error(operator):
    function, tensors = sample_inputs(operator, CASES[operator][2], torch.float64)
    for i, tensor in enumerate(tensors):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{operator}: .* carries a tangent"):
            function(*tensors[:i], forward_ad.make_dual(tensor, torch.ones_like(tensor)), *tensors[i + 1 :])
    with pytest.raises(RuntimeError, match=f"^{operator}: .* carries a tangent"):
        torch.func.jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors)))


def raw_arguments(operator, case, dtype=torch.float32):
    """The arguments of both registered operators of a public one, forward and backward."""
    _, tensors = sample_inputs(operator, case, dtype)
    d = len(case.S)
    per_axis = [[v] * d if isinstance(v, int) else list(v) for v in (case.window, case.stride)]
    extra = {"veu": (per_axis[0], case.heads, 0.5, None), "warp": (per_axis[1], False), "compose": (per_axis[1],)}
    order = (False,) if operator == "warp" else ()  # channels_last
    forward = (*tensors, *extra[operator], *order)
    outputs = getattr(torch.ops.cover_kernels, f"{operator}_fwd")(*forward)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    saved = (*tensors, *outputs) if operator == "veu" else (*tensors,)
    deterministic = () if operator == "veu" else (True,)
    return forward, (torch.randn_like(outputs[0]), *saved, *extra[operator], *deterministic, *order)


@pytest.mark.parametrize(
    ("operator", "case"), [(o, c) for o, c in PARAMETERS if c.why in ("groups", "coarser flow", "volume")], ids=str
)
def test_opcheck(operator, case):
    forward, backward = raw_arguments(operator, case)
    leaves = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in forward)
    torch.library.opcheck(getattr(torch.ops.cover_kernels, f"{operator}_fwd").default, leaves)
    torch.library.opcheck(getattr(torch.ops.cover_kernels, f"{operator}_bwd").default, backward)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_kernels_match_shapes_and_dtypes(operator):
    for case in CASES[operator]:
        for dtype in DTYPES:
            forward, backward = raw_arguments(operator, case, dtype)
            for name, arguments in ((f"{operator}_fwd", forward), (f"{operator}_bwd", backward)):
                op = getattr(torch.ops.cover_kernels, name)
                real = op(*arguments)
                meta = op(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
                real, meta = (r if isinstance(r, tuple) else (r,) for r in (real, meta))
                assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in meta]


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_graph_breaks(operator):
    case = next(c for c in CASES[operator] if c.why == "volume")
    function, tensors = sample_inputs(operator, case, torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = run(function, tensors, BACKENDS[0])
    assert all(torch.equal(a, e) for a, e in zip(run(compiled, tensors, BACKENDS[0]), expected, strict=True))


def test_compiles_where_numbers_change_from_call_to_call():
    q, k = torch.randn(2, 1, 8, 5, 6)
    compiled = torch.compile(cover_kernels.veu, fullgraph=True, backend="aot_eager")
    for window, heads, scale in ((3, 1, 0.5), (3, 2, 0.25), (5, 4, 0.1)):
        expected = cover_kernels.veu(q, k, window, heads, scale)
        assert torch.equal(compiled(q, k, window, heads, scale), expected)


def test_compiles_with_inductor():
    def chain(q, k, u):
        w = cover_kernels.veu(q, cover_kernels.warp(k, u, 2), 3, 2)
        return cover_kernels.compose(u, w, 2).square()

    tensors = [torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8), torch.randn(1, 2, 3, 4)]
    expected = run(chain, tensors, BACKENDS[0])
    actual = run(torch.compile(chain, fullgraph=True), tensors, BACKENDS[0])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(operators.DEVICE == "cpu", reason="of GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_and_backward_are_captured_into_a_cuda_graph(operator, backend):
    case = next(c for c in CASES[operator] if c.why == "volume")
    function, tensors = sample_inputs(operator, case, torch.float32)
    _, others = sample_inputs(operator, case, torch.float32, seed=1)
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = grad_like(function(*tensors))

    def step():
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    with cover_kernels.use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Triton compiles in the first call
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf, other in zip(leaves, others, strict=True):
                leaf.copy_(other)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operator", "case"), [(o, c) for o, c in PARAMETERS if c.B], ids=str)
def test_same_bits_whatever_the_number_of_threads(operator, case, backend):
    function, tensors = sample_inputs(operator, case, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(function, tensors, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize(
    ("operator", "S", "stride", "dtype"),
    [
        ("warp", (20, 37, 70), 1, torch.float32),
        ("warp", (130, 150), 2, torch.float32),
        ("warp", (64, 4096), 1, torch.bfloat16),  # more sums in float than the CPU kernels keep
        ("compose", (20, 36, 72), 2, torch.float32),
    ],
)
def test_gradients_of_images_of_many_tiles(operator, S, stride, dtype, far, backend):
    """Tiles that several threads work on, whose boxes overlap, or which read so widely that no box is copied."""
    case = operators.Case("many tiles", S, B=1, channels=9, stride=stride)
    function, tensors = sample_inputs(operator, case, dtype)
    if far:
        tensors[1].mul_(8)
    exact = [t.double() for t in tensors]
    grad = grad_like(function(*exact))
    exact = run(function, exact, "reference", grad)
    same = run(function, tensors, "reference", grad)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(run(function, tensors, backend, grad))
    finally:
        torch.set_num_threads(threads)
    assert_close(results[0], same, exact)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, u = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6), torch.randn(1, 2, 6, 6)
    with torch.autocast(operators.DEVICE, dtype):
        # a convolution's output is half, a normalisation's is float: the wider one counts
        mixed = cover_kernels.veu(q.to(dtype), k, 3)
        half = cover_kernels.veu(q.to(dtype), k.to(dtype), 3)
        warped = cover_kernels.warp(k.to(dtype), u)
        sampled = cover_kernels.warp(k, u.to(dtype))
        chained = [cover_kernels.compose(u.to(dtype), u), cover_kernels.compose(u, u.to(dtype))]
        with pytest.raises(TypeError, match="`k` must be"):
            cover_kernels.veu(q, k.int(), 3)
    assert half.dtype == torch.float32
    assert warped.dtype == dtype
    assert torch.equal(mixed, cover_kernels.veu(q.to(dtype).float(), k, 3))
    wide = u.to(dtype).float()
    assert torch.equal(sampled, cover_kernels.warp(k, wide))
    assert torch.equal(chained[0], cover_kernels.compose(wide, u))
    assert torch.equal(chained[1], cover_kernels.compose(u, wide))


@pytest.mark.skipif(operators.DEVICE != "cpu", reason="of the CPU kernels")
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2], ids=str
)
@pytest.mark.parametrize("operator", ["warp", "compose"])
def test_gradients_take_little_memory_beside_themselves(operator, dtypes):
    S = (6, 512, 512)
    x, flow = torch.randn(1, 3, *S).to(dtypes[0]), torch.randn(1, 3, *S).to(dtypes[1])
    if operator == "compose":
        x = x.to(flow.dtype)
    leaves = x.requires_grad_(), flow.requires_grad_()
    with cover_kernels.use_backend("cpu"):
        y = getattr(cover_kernels, operator)(*leaves)
        used, _ = peak_above(lambda: torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True))
    assert used < sum(t.numel() * t.element_size() for t in (*leaves, y)) + 16e6


@pytest.mark.skipif(operators.DEVICE != "cpu", reason="instruction sets are the CPU's")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_agrees(isa, tmp_path):
    """In a process each, since the choice is made once: the other instruction sets give what this one gives."""
    dtypes = (torch.float32, torch.bfloat16)  # those that an instruction set may have kernels of its own for
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from operators import *;"
        f"torch.save([run(*sample_inputs(o, c, t), 'cpu') for o, c in PARAMETERS for t in {dtypes}], sys.argv[2])"
    )
    path = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), str(path)],
        env={**os.environ, "COVER_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "not in this processor" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    calls = product(PARAMETERS, dtypes)
    for ((operator, case), dtype), result in zip(calls, torch.load(path, weights_only=True), strict=True):
        function, tensors = sample_inputs(operator, case, dtype)
        exact = run(function, [t.double() for t in tensors], "cpu")
        assert_close(result, run(function, tensors, "cpu"), exact)
