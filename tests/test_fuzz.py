"""The operators' arguments at random: right ones give what the reference gives, wrong ones a clear error.

    pytest test_fuzz.py --examples 5000    as many of each test as asked for, others every time

`make sanitize` does this under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set.
"""

import math

import operators
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from operators import DTYPES, OPERATORS, grad_like, run

import cover_kernels

BACKENDS = operators.compiled_backends()
FLOWS = ("eighths", "far", "not finite")
SHORT = 40  # examples of each test; these are always the same


@pytest.fixture
def fuzz(request, capsys):
    """Runs a test of one argument on many examples of it."""

    def many(strategy, test):
        examples, count = request.config.getoption("examples"), 0
        short = examples == SHORT

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=short,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def counted(call):
            nonlocal count
            count += 1
            test(call)

        counted()
        if not short:
            with capsys.disabled():
                print(f" {count} examples", end="", flush=True)

    return many


def laid_out(draw, x):
    """`x` with strides that a caller may have: what holds its values is larger, or in another order."""
    layout = draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed", "offset", "expanded"]))
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def numbers(draw, shape, dtype, kind="normal"):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind != "normal":
        x = (x * 16).round() / 8  # exact in every dtype: the cell of a position does not depend on the precision
    if kind == "far":
        x = x * 10 ** draw(st.integers(1, 4))
    if kind == "not finite":
        x[torch.rand(shape, generator=generator) < 0.1] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
    return laid_out(draw, x.to(dtype))


@st.composite
def calls(draw, operator=None, kinds=FLOWS):
    """A right call: (operator, its arguments by name, whether all values are finite and near)."""
    operator = operator or draw(st.sampled_from(OPERATORS))
    d, dtype = draw(st.sampled_from([2, 2, 3])), draw(st.sampled_from(DTYPES))
    B = draw(st.integers(0, 2))
    coarse = draw(st.lists(st.integers(1, 7 if d == 2 else 4), min_size=d, max_size=d))
    if operator == "veu":
        S = [*coarse[:-1], draw(st.integers(1, 40 if d == 2 else 20))]
        window = draw(st.lists(st.sampled_from([1, 3, 3, 5, 7, 9, 21]), min_size=d, max_size=d))
        if d == 3:
            window = [min(n, 7) for n in window]
        heads, C = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 9, 16, 33]))
        shape = B, heads * C, *S
        mask = draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
        if mask is not None:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
            mask = laid_out(draw, torch.rand((B, 1, *S), generator=generator) < mask)
        return (
            operator,
            {
                "q": numbers(draw, shape, dtype),
                "k": numbers(draw, shape, dtype),
                "window": window[0] if len(set(window)) == 1 else tuple(window),
                "heads": heads,
                "scale": draw(st.sampled_from([None, 0, 1, -0.5, 0.1])),
                "mask": mask,
            },
            "eighths",
        )
    kind = draw(st.sampled_from(kinds))
    stride = draw(st.lists(st.integers(1, 4 if d == 2 else 2), min_size=d, max_size=d))
    S = [n * s for n, s in zip(coarse, stride, strict=True)]
    stride = stride[0] if len(set(stride)) == 1 else tuple(stride)
    if operator == "warp":
        mixed = dtype in (torch.bfloat16, torch.float16) and draw(st.booleans())
        return (
            operator,
            {
                "x": numbers(draw, (B, draw(st.sampled_from([1, 2, 3, 9])), *S), dtype),
                "flow": numbers(draw, (B, d, *coarse), torch.float32 if mixed else dtype, kind),
                "stride": stride,
                "padding": draw(st.sampled_from(["zeros", "border"])),
            },
            kind,
        )
    residual = numbers(draw, (B, d, *S), dtype, kind)
    return operator, {"flow": numbers(draw, (B, d, *coarse), dtype, kind), "residual": residual, "stride": stride}, kind


def as_function(operator, arguments):
    """A function of the differentiable tensors, and these."""
    names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.dtype != torch.bool]

    def function(*tensors):
        return getattr(cover_kernels, operator)(**arguments | dict(zip(names, tensors, strict=True)))

    return function, [arguments[name] for name in names]


def assert_agrees(actual, same, exact, inputs):
    """The project's tolerance (operators.assert_close) for tensors of a few values, where plain PyTorch may be exact by
    chance: the floor is 64 roundings of the largest number that the sums behind a value can hold."""
    largest = max((t.abs().max().item() for t in inputs if t.numel()), default=0)
    for a, s, e in zip(actual, same, exact, strict=True):
        assert a.shape == e.shape and a.dtype == s.dtype and not a.isnan().any()
        if a.numel():
            floor = 64 * torch.finfo(a.dtype).eps * max(e.abs().max().item(), 1) * max(largest, 1)
            error, allowed = (a.double() - e).abs().max().item(), 2 * (s.double() - e).abs().max().item() + floor
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_right_arguments_give_what_the_reference_gives(fuzz, operator, backend):
    def test(call):
        _, arguments, kind = call
        event(kind)
        function, tensors = as_function(operator, arguments)
        if kind != "eighths":  # far away, or nowhere: no memory but its own is read or written
            assert [t.shape for t in run(function, tensors, backend)[1:]] == [t.shape for t in tensors]
            return
        wide = [t.double() for t in tensors]
        grad = grad_like(function(*wide))
        exact, same, actual = (
            run(function, t, b, grad) for t, b in ((wide, "reference"), (tensors, "reference"), (tensors, backend))
        )
        if not is_exact(arguments.get("stride", 1)):
            exact, same, actual = exact[:1], same[:1], actual[:1]
        assert_agrees(actual, same, exact, tensors)

    fuzz(calls(operator), test)


def is_exact(stride):
    """Whether the positions of a finer level are exact: else rounding says in which cell one on the border of two lies,
    and with it the derivative."""
    return all(s & (s - 1) == 0 for s in (stride if isinstance(stride, tuple) else (stride,)))


def wrong_values(x):
    """What cannot stand for the argument `x` in any call."""
    if isinstance(x, torch.Tensor):
        return [
            None,
            1.0,
            x.numpy(force=True) if x.dtype != torch.bfloat16 else [],
            x[..., None, None],
            x[0] if x.shape[0] else x.sum(0),
            x[..., :0],
            torch.cat([x, x[..., :1]], dim=-1),
            torch.cat([x, x], dim=0) if x.shape[0] else x.new_zeros(1, *x.shape[1:]),
            x.to(torch.int32),
            x.to(torch.complex64),
            x.to_sparse(),
            x.to("meta"),
        ]
    return {
        "window": [0, 2, -3, 3.0, "3", None, (3,), (3, 3, 3, 3), True, 2**40, (3, 4, 3), float("nan")],
        "heads": [0, -1, 1.0, "1", None, 10**6, True],
        "scale": [math.nan, math.inf, "1", [1.0], 1j],
        "stride": [0, -1, 1.0, "1", None, (1,), (1, 1, 1, 1), True, 2**40, 10**6],
        "padding": ["", "reflect", None, 0],
    }


@st.composite
def wrong_calls(draw):
    """A call with one argument that cannot be: (operator, arguments, the name of that one)."""
    operator, arguments, _ = draw(calls(kinds=("eighths",)))
    name = draw(st.sampled_from([n for n, x in arguments.items() if n != "mask" or x is not None]))
    if isinstance(arguments[name], torch.Tensor):
        wrong = wrong_values(arguments[name])
        wrong = wrong[1:] if name == "mask" else wrong  # None stands for no mask
    else:
        wrong = wrong_values(None)[name]
    return operator, arguments | {name: draw(st.sampled_from(wrong))}, name


def test_wrong_arguments_are_a_clear_error(fuzz):
    def test(call):
        operator, arguments, name = call
        event(f"{operator} {name}")
        with pytest.raises((TypeError, ValueError), match=rf"^{operator}: `\w+` must .*(got|, got)"):
            getattr(cover_kernels, operator)(**arguments)

    fuzz(wrong_calls(), test)


@st.composite
def raw_calls(draw):
    """Arguments of a registered operator of which one is another call's: (name, arguments)."""
    operator, arguments, _ = draw(calls(kinds=("eighths",)))
    _, tensors = as_function(operator, arguments)
    _, *S = tensors[0 if operator != "compose" else 1].shape[1:]

    def axes(value):
        return list(value) if isinstance(value, tuple) else [value] * len(S)

    if operator == "veu":
        extra = [axes(arguments["window"]), arguments["heads"], 1.0, arguments["mask"]]
    else:
        extra = [axes(arguments["stride"]), *([arguments["padding"] == "border"] if operator == "warp" else [])]
    order = [draw(st.booleans())] if operator == "warp" else []  # channels_last
    raw, name = [*tensors, *extra, *order], f"{operator}_fwd"
    if draw(st.booleans()):
        outputs = getattr(torch.ops.cover_kernels, name)(*raw)
        saved = outputs if isinstance(outputs, tuple) else ()
        y = saved[0] if saved else outputs
        raw = [torch.ones_like(y), *tensors, *saved, *extra, *([] if saved else [draw(st.booleans())]), *order]
        name = f"{operator}_bwd"
    i = draw(st.integers(0, len(raw) - 1))
    if isinstance(raw[i], torch.Tensor):
        x = raw[i]
        shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=6))
        raw[i] = draw(st.sampled_from([x.double(), x.half(), x[..., :1], x[:, :1], x[:1], x.new_zeros(shape)]))
    elif isinstance(raw[i], list):
        raw[i] = draw(st.lists(st.integers(-3, 9), min_size=0, max_size=4))
    elif isinstance(raw[i], int) and not isinstance(raw[i], bool):
        raw[i] = draw(st.integers(-3, 50))
    return name, raw


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_raw_calls_stay_inside_their_tensors(fuzz, backend):
    """What the Python functions would refuse is refused again below them, or it fits by chance."""

    def test(call):
        name, arguments = call
        with cover_kernels.use_backend(backend):
            try:
                getattr(torch.ops.cover_kernels, name)(*arguments)
            except RuntimeError as error:
                event("refused")
                assert "INTERNAL ASSERT" not in str(error)

    fuzz(raw_calls(), test)
