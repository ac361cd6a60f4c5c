"""VEU against its definition: what the softmax over a window must return, and what it may cost."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DEVICE, compiled_backends

import cover_kernels
from cover_kernels import veu
from cover_kernels.measure import peak_above

BACKENDS = [*compiled_backends(), "reference"]


def by_definition(q, k, window, heads, scale, mask):
    """One voxel after another, straight from the formula, in Python floats."""
    B, JC, *S = q.shape
    C = JC // heads
    v = torch.zeros(B, len(S), *S, dtype=torch.float64)
    for b, p in itertools.product(range(B), itertools.product(*map(range, S))):
        for j in range(heads):
            group = slice(j * C, (j + 1) * C)
            offsets, scores = [], []
            for o in itertools.product(*(range(-(n // 2), n // 2 + 1) for n in window)):
                key = tuple(x + y for x, y in zip(p, o, strict=True))
                if all(0 <= x < n for x, n in zip(key, S, strict=True)) and (mask is None or mask[(b, 0, *key)]):
                    offsets.append(o)
                    scores.append(scale * (q[(b, group, *p)] @ k[(b, group, *key)]))
            if offsets:
                w = torch.stack(scores).softmax(0)
                v[(b, slice(None), *p)] += w @ torch.tensor(offsets, dtype=torch.float64) / heads
    return v


sizes = st.lists(st.integers(1, 5), min_size=2, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    S=sizes,
    window=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=3, max_size=3),
    B=st.integers(1, 2),
    heads=st.integers(1, 3),
    channels=st.integers(1, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_is_its_definition(name, S, window, B, heads, channels, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    window = window[: len(S)]
    with torch.device("cpu"):
        q, k = torch.randn((2, B, heads * channels, *S), generator=generator, dtype=torch.float64)
        mask = torch.rand((B, 1, *S), generator=generator) < 0.6 if masked else None
        expected = by_definition(q, k, window, heads, 0.7, mask)
    with cover_kernels.use_backend(name):
        v = veu(q.to(DEVICE), k.to(DEVICE), tuple(window), heads, 0.7, None if mask is None else mask.to(DEVICE))
    torch.testing.assert_close(v.cpu(), expected)


def test_default_scale_is_the_root_of_the_group_channels(backend):
    q, k = torch.randn(2, 1, 8, 5, 6)
    assert torch.equal(veu(q, k, 3, heads=2), veu(q, k, 3, heads=2, scale=0.5))


@pytest.mark.parametrize("shift", [(2, -1), (0, 0), (-3, 3), (1, -2, 0)])
def test_one_hot_positions_return_the_displacement_exactly(backend, shift):
    S = (8, 9) if len(shift) == 2 else (4, 6, 5)
    n = torch.tensor(S).prod().item()
    k = torch.eye(n).reshape(1, n, *S)
    q = k.roll(tuple(-s for s in shift), dims=tuple(range(2, 2 + len(S))))  # q(p) is the code of p + shift
    v = veu(q, k, 7, scale=1e4)
    inside = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, S, strict=True))
    expected = torch.tensor(shift, dtype=torch.float32).view(-1, *[1] * len(S))
    assert torch.equal(v[0][(slice(None), *inside)], expected.expand_as(v[0])[(slice(None), *inside)])


def test_constant_features_average_the_offsets_inside_the_image(backend):
    v = veu(torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4, 5), 3)
    assert torch.allclose(v[:, :, 1:-1, 1:-1], torch.zeros(1))
    # at the border the window is cut, not filled: mean of {0, 1} and of {-1, 0}
    assert torch.allclose(v[0, 0, 0], torch.tensor(0.5)) and torch.allclose(v[0, 1, :, -1], torch.tensor(-0.5))


def test_a_window_of_any_width_costs_what_the_image_is_wide(backend):
    q, k = torch.randn(2, 1, 4, 3, 5)
    q.requires_grad_()
    wide, enough = veu(q, k, 2**31 - 1, heads=2), veu(q, k, (5, 9), heads=2)
    assert torch.equal(wide, enough)
    assert torch.equal(*(torch.autograd.grad(v.square().sum(), q)[0] for v in (wide, enough)))


def test_masked_keys_take_no_part_whatever_they_hold(backend):
    q, k = torch.randn(2, 1, 3, 6, 7)
    mask = torch.rand(1, 1, 6, 7) < 0.7
    poisoned = torch.where(mask, k, torch.nan).requires_grad_()
    q.requires_grad_()
    v = veu(q, poisoned, 5, mask=mask)
    assert torch.equal(v, veu(q, k, 5, mask=mask))
    grad_q, grad_k = torch.autograd.grad(v.sum(), (q, poisoned))
    assert grad_q.isfinite().all()
    assert torch.equal(grad_k[~mask.expand_as(k)], torch.zeros_like(grad_k[~mask.expand_as(k)]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_the_output(backend, value):
    q, k = torch.randn(2, 1, 3, 9, 40)
    q[0, 0, 4, 20] = value
    assert veu(q, k, 3)[0, :, 4, 20].isnan().all()
    assert veu(q, k, 3)[0].isnan().sum() == 2


@pytest.mark.parametrize("strength", [1, 30])  # scores within their bound, and beyond it
@pytest.mark.parametrize(
    "S, window, heads", [((7, 24), 7, 4), ((3, 5, 12), 5, 8), ((5, 20), 39, 12), ((3, 6), (3, 1), 16)]
)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 5e-5), (torch.float64, 1e-12)])
def test_groups_do_not_see_each_other(S, window, heads, strength, dtype, close, backend):
    """Rows of several groups may be worked on side by side: each gives what it gives alone."""
    q, k = (torch.randn(2, 2, heads * 3, *S, dtype=dtype) * strength).requires_grad_()
    g = torch.randn(2, len(S), *S, dtype=dtype)
    alone = [veu(q[:, i : i + 3], k[:, i : i + 3], window) for i in range(0, heads * 3, 3)]
    tolerance = dict(rtol=0, atol=close * strength**2)
    v = veu(q, k, window, heads)
    torch.testing.assert_close(v, torch.stack(alone).mean(0), **tolerance)
    leaves = (q, k)
    ours, theirs = torch.autograd.grad(v, leaves, g), torch.autograd.grad(sum(alone) / heads, leaves, g)
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_what_a_group_holds_does_not_reach_another(backend):
    q, k = torch.randn(2, 1, 4 * 3, 5, 12)
    arguments = [5, 5], 4, 1.0, None
    poisoned = k.clone()
    poisoned[:, 3:6] = torch.nan
    poisoned[:, 9:12] = torch.inf
    before, after = (torch.ops.cover_kernels.veu_fwd(q, x, *arguments)[1] for x in (k, poisoned))
    torch.testing.assert_close(after[:, ::2], before[:, ::2])
    assert not after[:, 1].isfinite().any()


def test_large_scores_do_not_overflow(backend):
    q, k = torch.randn(2, 1, 4, 8, 8) * 1e4
    assert veu(q, k, 5).isfinite().all()
    assert veu(q, k, 5).abs().max() <= 2


@pytest.mark.parametrize(
    "scores",
    [
        lambda t: 40 * t,  # each row, and each plane, has a new maximum, by far
        lambda t: 3 * t,  # by little
        # the first planes' scores need their maximum, above or below 0, the last ones' do not
        lambda t: 4 * (16 - t),
        lambda t: -4 * (16 - t),
        lambda t: -40 * t,
        lambda t: -300 - 5 * (t - 8).abs(),  # all of them far below 0
        lambda t: 200 * (-1) ** t,
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_size_are_weighed_by_their_differences(backend, dtype, scores, masked):
    S = (5, 9, 20)
    z, y, x = torch.meshgrid(*map(torch.arange, S), indexing="ij")
    k = scores(y + 2 * z).float() + torch.randint(-2, 3, S, generator=torch.Generator().manual_seed(0))
    # a row's first valid keys then come late, and in some windows never
    mask = ((y > 5) & (x % 9 > 2))[None, None] if masked else None
    q, k = torch.ones(1, 1, *S, dtype=dtype), (k[None, None] / 8).to(dtype)
    v = veu(q, k, 7, scale=8.0, mask=mask)
    with cover_kernels.use_backend("reference"):
        exact = veu(q.double(), k.double(), 7, scale=8.0, mask=mask)
    torch.testing.assert_close(v.double(), exact, rtol=0, atol=1e-3)  # scores up to 700 end at 6e-5 in float32


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("S", "strong"), [((40, 70), 24), ((6, 7, 40), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_where_some_keys_score_far_above_all_others(backend, dtype, S, strong, heads):
    """Queries near a border of strong features see scores near 0, and a log-sum-exp of hundreds."""
    torch.manual_seed(0)
    q, k = torch.randn((2, 1, 4 * heads, *S), dtype=torch.float64)
    g = torch.randn(1, len(S), *S, dtype=torch.float64)
    q[:, :, :strong] *= 12
    k[:, :, :strong] *= 12
    q[:, :, strong:] *= 0.1
    k[:, :, strong:] *= 0.1
    q, k, results = q.to(dtype), k.to(dtype), []
    for name, wide in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.to(DEVICE, wide).requires_grad_() for x in (q, k)]
        with cover_kernels.use_backend(name):
            v = veu(*leaves, 5, heads)
            results.append(torch.autograd.grad(v, leaves, g.to(v)))
    # a score of hundreds is rounded by 3e-5, and so is each weight; a gradient is rounded to its dtype
    allowed = 1e-3 + torch.finfo(dtype).eps
    for own, exact in zip(*results, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=0, atol=allowed * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_are_rounded_by_more_than_one_find_their_maximum(backend, dtype):
    torch.manual_seed(0)
    power = 2.0 ** (16 if dtype == torch.float32 else 40)
    k = power * torch.randperm(8 * 40).view(1, 1, 8, 40).to(DEVICE, dtype)
    q = torch.full_like(k, power)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    v = veu(*leaves, 3, scale=1.0)
    around = torch.nn.functional.pad(k.detach(), (1, 1, 1, 1), value=-1).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    best = around.argmax(-1)
    assert torch.equal(v.detach(), torch.cat((best // 3 - 1, best % 3 - 1), 1).to(dtype))
    assert all(x.isfinite().all() for x in torch.autograd.grad(v.sum(), leaves))


def test_backward_through_the_ring_of_slabs():
    """An image too large for the ring at once gives what its parts give: the excess crosses from slab to slab."""
    torch.manual_seed(0)
    S, heads = (1200, 1000), 2
    q, k = torch.randn(2, 1, 2 * heads, *S)
    g = torch.randn(1, 2, *S)

    def grads(rows):
        leaves = [t[:, :, rows].clone().requires_grad_() for t in (q, k)]
        with cover_kernels.use_backend("cpu"):
            return torch.autograd.grad(veu(*leaves, (5, 3), heads), leaves, g[:, :, rows])

    whole = grads(slice(0, 1200))
    for first in (0, 300, 600, 900):
        low, high = max(0, first - 8), min(1200, first + 308)
        part = grads(slice(low, high))
        # rows whose window, and whose queries' windows, lie inside the part
        for w, p in zip(whole, part, strict=True):
            torch.testing.assert_close(w[:, :, first : first + 300], p[:, :, first - low :][:, :, :300])


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
@pytest.mark.parametrize("window", [3, 7, (3, 25, 25)])
def test_memory_is_outputs_log_sum_exp_and_little_scratch(window):
    S, heads, channels = (8, 96, 96), 4, 4
    q, k = torch.randn(2, 1, heads * channels, *S)
    q.requires_grad_(), k.requires_grad_()
    size = 4 * q[0, 0].numel()
    scratch = 16e6
    with cover_kernels.use_backend("cpu"):
        used, v = peak_above(lambda: veu(q, k, window, heads))
        assert used < size * (3 + heads) + scratch
        grad = torch.ones_like(v)
        used, _ = peak_above(lambda: torch.autograd.grad(v, (q, k), grad, retain_graph=True))
    assert used < size * 2 * heads * channels + scratch


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
def test_large_planes_and_deep_windows_are_worked_on_in_strips():
    """What a ring of window-deep planes would hold is 20 MB here; the voxels beyond a cut must not miss the others'."""
    q, k = torch.randn(2, 1, 2, 9, 768, 768, generator=torch.Generator().manual_seed(0))
    q.requires_grad_(), k.requires_grad_()
    with cover_kernels.use_backend("cpu"):
        v = veu(q, k, (9, 3, 1), 2)
        grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
        used, grads = peak_above(lambda: torch.autograd.grad(v, (q, k), grad, retain_graph=True))
    assert used < 2 * 4 * q.numel() + 16e6
    for low in (0, 250, 500, 700):
        part = (..., slice(low, low + 68), slice(None, 64))
        q_part, k_part = q[part].detach().requires_grad_(), k[part].detach().requires_grad_()
        with cover_kernels.use_backend("reference"):
            expected = torch.autograd.grad(veu(q_part, k_part, (9, 3, 1), 2), (q_part, k_part), grad[part])
        inner = slice(2 if low else 0, -2 if low < 700 else None)  # what lies beyond the cut of the part matters there
        for whole, small in zip(grads, expected, strict=True):
            torch.testing.assert_close(whole[part][..., inner, :], small[..., inner, :], rtol=1e-4, atol=1e-5)


def arguments(**changes):
    given = {"q": torch.zeros(1, 4, 5, 6), "k": torch.zeros(1, 4, 5, 6), "window": 3, "heads": 2}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1, 2]}, TypeError, "veu: `q` must be a tensor, got list"),
        ({"q": torch.zeros(4, 5)}, ValueError, r"veu: `q` must be \[B, J\*C, H, W\].* got \[4, 5\]"),
        ({"q": torch.zeros(1, 4, 0, 6)}, ValueError, "veu: `q` must have no empty axis"),
        ({"q": torch.zeros(1, 4, 5, 6, dtype=torch.int64)}, TypeError, "veu: `q` must be float64.* got torch.int64"),
        ({"k": None}, TypeError, "veu: `k` must be a tensor, got NoneType"),
        ({"k": torch.zeros(1, 4, 5, 7)}, ValueError, r"veu: `k` must have shape \[1, 4, 5, 6\].* got \[1, 4, 5, 7\]"),
        ({"k": torch.zeros(1, 4, 5, 6).half()}, TypeError, "veu: `k` must be torch.float32.* got torch.float16"),
        ({"k": torch.zeros(1, 4, 5, 6, device="meta")}, ValueError, "veu: `k` must be on the device.* got meta"),
        ({"window": 4}, ValueError, "veu: `window` must be odd"),
        ({"window": (3, 3, 3)}, ValueError, r"veu: `window` must be a positive int or 2 of them.* got \(3, 3, 3\)"),
        ({"window": 3.0}, ValueError, "veu: `window` must be a positive int or 2 of them.* got 3.0"),
        ({"window": -3}, ValueError, "veu: `window` must be a positive int"),
        ({"heads": 3}, ValueError, "veu: `heads` must be a positive int that divides the 4 channels, got 3"),
        ({"heads": 0}, ValueError, "veu: `heads`"),
        ({"mask": torch.ones(1, 1, 5, 6)}, TypeError, "veu: `mask` must be torch.bool.* got torch.float32"),
        ({"mask": torch.ones(1, 4, 5, 6) > 0}, ValueError, r"veu: `mask` must have shape \[1, 1, 5, 6\]"),
    ],
)
def test_bad_arguments_are_named(backend, changes, error, message):
    with pytest.raises(error, match=message):
        veu(**arguments(**changes))
