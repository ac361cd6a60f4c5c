"""warp against its definition: identity to the bit, shifts, strides, borders, and what bad input gives."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, compiled_backends

import cover_kernels
from cover_kernels import warp

BACKENDS = [*compiled_backends(), "reference"]
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("S", "stride"), [((5, 7), 1), ((6, 4), 2), ((3, 4, 5), 1), ((4, 6, 8), (1, 3, 2))])
def test_zero_displacement_is_the_identity_to_the_bit(backend, dtype, padding, S, stride):
    x = torch.randn(2, 8, *S).to(dtype)
    x[0, 0].flatten()[:4] = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-40]).to(dtype)
    steps = (stride,) * len(S) if isinstance(stride, int) else stride
    flow = torch.zeros(2, len(S), *(n // s for n, s in zip(S, steps, strict=True)), dtype=dtype)
    same_bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    for order in (torch.contiguous_format, LAST[len(S)]):
        y = warp(x.contiguous(memory_format=order), flow, stride, padding)
        assert torch.equal(y.view(same_bits), x.view(same_bits))


@settings(max_examples=30, deadline=None)
@given(shift=st.lists(st.integers(-6, 6), min_size=2, max_size=3), border=st.booleans())
@pytest.mark.parametrize("name", BACKENDS)
def test_integer_shift_is_exact(name, shift, border):
    S = (5, 6, 4)[: len(shift)]
    x = torch.randn(1, 2, *S)
    flow = torch.tensor(shift, dtype=torch.float32).view(1, -1, *[1] * len(S)).expand(1, -1, *S)
    with cover_kernels.use_backend(name):
        y = warp(x, flow, padding="border" if border else "zeros")
    index = [torch.arange(n) + s for n, s in zip(S, shift, strict=True)]
    inside = torch.stack(
        torch.meshgrid(*[(i >= 0) & (i < n) for i, n in zip(index, S, strict=True)], indexing="ij")
    ).all(0)
    grid = torch.meshgrid(*[i.clamp(0, n - 1) for i, n in zip(index, S, strict=True)], indexing="ij")
    expected = x[(slice(None), slice(None), *grid)]
    assert torch.equal(y, expected if border else expected * inside)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("S", [(7, 9), (4, 6, 5)])
def test_agrees_with_grid_sample(backend, padding, S):
    """PyTorch's own sampler, told the same positions in its own coordinates."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *S, dtype=torch.float64)
    flow = 3 * torch.randn(2, len(S), *S, dtype=torch.float64)
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in S], indexing="ij")
    size = torch.tensor(S).view(-1, *[1] * len(S))
    grid = ((torch.stack(axes) + flow + 0.5) * 2 / size - 1).flip(1).movedim(1, -1)
    expected = F.grid_sample(x, grid, "bilinear", padding, align_corners=False)
    torch.testing.assert_close(warp(x, flow, padding=padding), expected)


@pytest.mark.parametrize(("S", "stride"), [((6, 8), 2), ((4, 6, 6), (2, 1, 3))])
def test_coarse_flow_is_upsampled_at_half_pixel_centres(backend, S, stride):
    """A stride is the same as warping by the flow that torch's interpolation brings to the level, in its voxels."""
    steps = (stride,) * len(S) if isinstance(stride, int) else stride
    x = torch.randn(1, 2, *S, dtype=torch.float64)
    flow = torch.randn(1, len(S), *(n // s for n, s in zip(S, steps, strict=True)), dtype=torch.float64)
    up = F.interpolate(flow, size=S, mode="bilinear" if len(S) == 2 else "trilinear", align_corners=False)
    up = up * torch.tensor(steps).view(-1, *[1] * len(S))
    torch.testing.assert_close(warp(x, flow, stride), warp(x, up))


def test_far_and_non_finite_displacements(backend):
    x = torch.ones(1, 1, 4, 4)
    flow = torch.zeros(1, 2, 4, 4)
    flow[0, 0, 0] = torch.tensor([1e30, -torch.inf, torch.inf, torch.nan])
    zeros, border = warp(x, flow)[0, 0, 0], warp(x, flow, padding="border")[0, 0, 0]
    assert zeros[:3].tolist() == [0, 0, 0] and border[:3].tolist() == [1, 1, 1]
    assert zeros[3].isnan() and border[3].isnan()


def test_gradient_of_the_flow_vanishes_where_it_is_clamped(backend):
    x = torch.randn(1, 1, 5, 5)
    flow = torch.full((1, 2, 5, 5), 20.0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(warp(x, flow, padding="border").sum(), flow)[0], torch.zeros(1, 2, 5, 5))
    # on the far border itself clamping begins; an identity must not pull there
    flow = torch.zeros(1, 2, 5, 5, requires_grad=True)
    grad = torch.autograd.grad(warp(x, flow, padding="border").sum(), flow)[0]
    assert torch.equal(grad[0, 0, -1], torch.zeros(5)) and torch.equal(grad[0, 1, :, -1], torch.zeros(5))


def arguments(**changes):
    return {"x": torch.zeros(1, 3, 4, 6), "flow": torch.zeros(1, 2, 4, 6), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"warp: `x` must be \[B, C, H, W\].* got \[3, 4\]"),
        ({"x": torch.zeros(1, 0, 4, 6)}, ValueError, "warp: `x` must have no empty axis"),
        ({"flow": torch.zeros(1, 3, 4, 6)}, ValueError, r"warp: `flow` must have shape \[1, 2, 4, 6\]"),
        ({"flow": torch.zeros(1, 2, 4, 6).double()}, TypeError, "warp: `flow` must be torch.float32"),
        ({"stride": 4}, ValueError, r"warp: `stride` must divide the spatial shape of `x`, \[4, 6\], got \[4, 4\]"),
        ({"stride": 2}, ValueError, r"warp: `flow` must have shape \[1, 2, 2, 3\]"),
        ({"stride": 0}, ValueError, "warp: `stride` must be a positive int"),
        ({"padding": "reflect"}, ValueError, 'warp: `padding` must be "zeros" or "border", got \'reflect\''),
        ({"flow": torch.zeros(1, 2, 4, 6, device="meta")}, ValueError, "warp: `flow` must be on the device"),
    ],
)
def test_bad_arguments_are_named(backend, changes, error, message):
    with pytest.raises(error, match=message):
        warp(**arguments(**changes))


@pytest.mark.parametrize("C", [1, 4])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_displacement_that_is_nan_along_one_axis_gives_nan_though_the_other_leads_outside(backend, padding, C):
    flow = torch.zeros(1, 2, 3, 3)
    flow[0, :, 1, 1] = torch.tensor([torch.nan, 100.0])
    y = warp(torch.ones(1, C, 3, 3), flow, padding=padding).flatten()
    assert y.isnan().tolist() == [i == 4 for i in range(9)] * C


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("reach", [(3, 3), (3, 90)])
@pytest.mark.parametrize(
    ("S", "C"),
    [((130, 150), 17), ((130, 150), 3), ((9, 1100), 9), ((8, 5000), 1), ((20, 37, 40), 1), ((20, 37, 40), 16)],
)
def test_images_of_many_tiles_under_near_and_far_displacements(S, C, reach, padding):
    """Some of them beyond what a tile of the CPU kernels copies, some infinite or NaN."""
    x = torch.randn(2, C, *S)
    flow = torch.tensor(reach).view(2, *[1] * (1 + len(S))) * torch.randn(2, len(S), *S)
    flow[:, :, 7, 11:14] = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(3, *[1] * (len(S) - 2))
    with cover_kernels.use_backend("reference"):
        expected = warp(x, flow, padding=padding)
    for name, order in product(BACKENDS, (torch.contiguous_format, LAST[len(S)])):
        with cover_kernels.use_backend(name):
            y = warp(x.contiguous(memory_format=order), flow, padding=padding)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("C", "order"), [(2, torch.contiguous_format), (8, torch.contiguous_format), (8, torch.channels_last)]
)
def test_what_a_position_does_not_reach_does_not_reach_its_gradients(backend, value, padding, C, order):
    """Positions on voxels read one voxel, and their derivative the next one too: not the others of the cell."""
    x = torch.randn(1, C, 4, 6)
    x[:, :, 0, 0] = value
    g = torch.randn(1, C, 4, 6)
    g[:, :, 3, 5] = value
    leaves = [x.contiguous(memory_format=order).requires_grad_(), torch.zeros(1, 2, 4, 6).requires_grad_()]
    grad_x, grad_flow = torch.autograd.grad(warp(*leaves, padding=padding), leaves, g)
    finite = torch.ones(4, 6, dtype=torch.bool)
    finite[3, 5] = False
    assert torch.equal(grad_x.isfinite().all(1)[0], finite)
    finite[0, 0] = False
    assert torch.equal(grad_flow.isfinite().all(1)[0], finite)


@pytest.mark.parametrize("C", [1, 3, 16])
@pytest.mark.parametrize("S", [(9, 12), (5, 6, 7), (12, 1)])
def test_all_that_is_like_the_image_lies_in_memory_as_the_image(backend, S, C):
    x, flow = torch.randn(2, C, *S), torch.randn(2, len(S), *S)
    results = []
    for order in (torch.contiguous_format, LAST[len(S)]):
        leaf = x.to(memory_format=order).requires_grad_()
        y = warp(leaf, flow)
        (grad,) = torch.autograd.grad(y.square().sum(), leaf)
        for like in (y, grad):
            assert like.is_contiguous(memory_format=order)
        results.append((y.detach(), grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
