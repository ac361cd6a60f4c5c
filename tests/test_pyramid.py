"""MoV and VectorPyramid against the formulas of design.md, written out in the plain order: warp, then project."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cover.pyramid import MoV, VectorPyramid, replicate
from cover_kernels import compose, veu, warp


def randomised(module, seed=0):
    """The module in float64 with random parameters, biases included."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.double().parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def features(channels, strides, size, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, *(n // s for n, s in zip(size, stride, strict=True)), generator=generator).double()
        for c, stride in zip(channels, strides, strict=True)
    ]


def plain_pyramid(pyramid, features_b, features_a):
    """VPA as the paper writes it: the features are warped, then projected with their bias."""
    flow = None
    for level, (mov, b, a) in enumerate(zip(pyramid.levels, features_b, features_a, strict=True)):
        projection = {2: torch.conv2d, 3: torch.conv3d}[b.dim() - 2]
        stride = None if flow is None else [
            c // f for c, f in zip(pyramid.strides[level - 1], pyramid.strides[level], strict=True)
        ]  # fmt: skip
        matched = a if flow is None else warp(a, flow, stride, padding="zeros")
        q, k = (mov.norm(projection(x, mov.project.weight, mov.bias.flatten())) for x in (b, matched))
        w = veu(q, k, mov.window, mov.heads)
        flow = w if flow is None else compose(flow, w, stride)
    return flow


@settings(max_examples=20, deadline=None)
@given(
    geometry=st.sampled_from(
        [
            (((4, 4), (2, 2), (1, 1)), (12, 8)),
            (((6, 2), (2, 2)), (12, 10)),
            (((2, 4, 4), (2, 2, 2), (1, 1, 1)), (4, 8, 4)),
        ]
    ),
    window=st.sampled_from([3, 5]),
    heads=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    norm=st.sampled_from(["unit", "group"]),
    seed=st.integers(0, 2**20),
)
def test_projecting_first_is_the_plain_order(geometry, window, heads, norm, seed):
    strides, size = geometry
    channels = (6, 5, 4)[: len(strides)]
    pyramid = VectorPyramid(channels, strides, window, heads[: len(strides)], 3, norm=norm)
    randomised(pyramid, seed)
    b, a = features(channels, strides, size, seed), features(channels, strides, size, seed + 1)
    torch.testing.assert_close(
        pyramid(b, a)[-1], plain_pyramid(pyramid, b, a), rtol=0, atol=1e-9  # rounding of float64, grown by a softmax
    )  # fmt: skip


class Constant(nn.Module):
    """Stands in for a MoV: the same displacement at every voxel."""

    def __init__(self, *flow):
        super().__init__()
        self.flow = torch.tensor(flow).double()

    def project(self, x):
        return x

    def forward(self, b, a, mask=None):
        return self.flow.view(1, -1, 1, 1).expand(len(b), -1, *b.shape[2:]).contiguous()


def test_projecting_first_is_the_plain_order_outside_view_a_too():
    # the pyramid's own flows never leave the image (see below): the border needs a flow of its own
    strides, size = ((2, 2), (1, 1)), (12, 10)
    pyramid = randomised(VectorPyramid((5, 5), strides, 3, (1, 2), 3))
    pyramid.levels[0] = coarse = Constant(2.4, -1.7)
    b, a = features((5, 5), strides, size, 1), features((5, 5), strides, size, 2)
    flow, mov = coarse(b[0], a[0]), pyramid.levels[1]
    q, k = (mov.norm(torch.conv2d(x, mov.project.weight, mov.bias.flatten())) for x in (b[1], warp(a[1], flow, 2)))
    expected = compose(flow, veu(q, k, mov.window, mov.heads), 2)
    torch.testing.assert_close(pyramid(b, a)[-1], expected, rtol=0, atol=1e-9)


def exact(channels, strides, window):
    """A pyramid that finds an exact match: no projection, and a softmax that takes the best key alone."""
    pyramid = VectorPyramid(channels, strides, window, [1] * len(channels), channels[0]).double()
    for mov in pyramid.levels:
        mov.project.weight.data = torch.eye(channels[0], dtype=torch.float64).view_as(mov.project.weight)
        mov.norm.length.data.fill_(100.0)
    return pyramid


def test_adds_up_what_the_levels_see():
    strides, window = ((4, 2), (2, 1)), (5, 7)
    pyramid = exact((16, 16), strides, window)
    a = features((16, 16), strides, (64, 48), seed=1)
    # b(p) = a(p + shift): 2 and -1 on the coarse level are 4 and -2 on the fine one, which sees one more and 3 less
    b = [torch.roll(a[0], (-2, 1), (2, 3)), torch.roll(a[1], (-5, 5), (2, 3))]
    coarse, fine = pyramid(b, a)
    inner = (..., slice(8, -8), slice(8, -8))
    expected = torch.tensor([5.0, -5.0], dtype=torch.float64).view(1, 2, 1, 1)
    torch.testing.assert_close(fine[inner], expected.expand_as(fine[inner]), rtol=0, atol=1e-9)
    torch.testing.assert_close(coarse[..., 4:-4, 4:-4].mean((0, 2, 3)), torch.tensor([2.0, -1.0]).double())
    assert pyramid.reach == (2 * (4 + 2), 3 * (2 + 1))


@settings(max_examples=20, deadline=None)
@given(window=st.sampled_from([3, 7, (5, 3)]), seed=st.integers(0, 2**20))
def test_flows_stay_within_reach_and_inside_view_a(window, seed):
    """p + flow(p) is a mean of positions inside view a: this is why no key is ever sampled from outside it."""
    strides, size = ((4, 4), (2, 4), (1, 1)), (16, 8)
    pyramid = randomised(VectorPyramid((4, 4, 4), strides, window, (2, 1, 1), 2), seed)
    flows = pyramid(features((4,) * 3, strides, size, seed), features((4,) * 3, strides, size, seed + 1))
    for flow, stride in zip(flows, strides, strict=True):
        for axis in range(2):
            n = flow.shape[2 + axis]
            position = flow[:, axis] + torch.arange(n).double().view([-1, 1] if axis == 0 else [1, -1])
            assert position.min() >= -1e-9 and position.max() <= n - 1 + 1e-9
            assert flow[:, axis].abs().max() * stride[axis] <= pyramid.reach[axis]


def test_a_shorter_list_of_heads_takes_the_finest_levels():
    channels, strides, size = (6, 5, 4), ((4, 4), (2, 2), (1, 1)), (8, 8)
    pyramid = randomised(VectorPyramid(channels, strides, 3, (2, 1), 3))
    b, a = features(channels, strides, size, 1), features(channels, strides, size, 2)
    flows = pyramid(b, a)
    assert [flow.shape[2:] for flow in flows] == [(4, 4), (8, 8)]
    assert pyramid.reach == (3.0, 3.0)
    torch.testing.assert_close(flows[-1], plain_pyramid(pyramid, b[1:], a[1:]), rtol=0, atol=1e-9)


def test_padding_holds_no_keys():
    pyramid = randomised(VectorPyramid((4,), ((2, 2),), 5, (2,), 3))
    b, a = features((4,), ((2, 2),), (16, 12), 1), features((4,), ((2, 2),), (16, 12), 2)
    size, real = (11, 9), (..., slice(6), slice(5))  # half a voxel of the level is still image
    (flow,) = pyramid(b, a, size)
    (cropped,) = pyramid([b[0][real]], [a[0][real]])
    torch.testing.assert_close(flow[real], cropped, rtol=0, atol=1e-12)
    # the padding takes the displacement of the edge, so that Up reads nothing else there
    assert torch.equal(flow, replicate(flow, (6, 5), (8, 6)))


def test_mask_outside_leaves_out_keys_sampled_from_the_padding():
    channels, strides, size = (4, 4), ((2, 2), (1, 1)), (16, 12)
    b, a = features(channels, strides, size, 1), features(channels, strides, size, 2)
    results = []
    for mask_outside in (False, True):
        pyramid = randomised(VectorPyramid(channels, strides, 3, (1, 1), 3, mask_outside=mask_outside))
        pyramid.levels[0] = Constant(0.0, 1.5)
        results.append(pyramid(b, a, (16, 9))[-1])
        last = pyramid.levels[1]
        q, k = (
            last.project(b[1]),
            warp(last.project(a[1]), torch.tensor([0.0, 3.0]).double().view(1, 2, 1, 1).expand(2, 2, 16, 12)),
        )
        column = torch.arange(12)
        mask = (column < 9) & ((column + 3 < 9) | (not mask_outside))
        w = last(q, k, mask.expand(2, 1, 16, 12).contiguous())
        # composed with a constant: 3 voxels more
        torch.testing.assert_close(results[-1][..., :9], w[..., :9] + torch.tensor([0.0, 3.0]).view(1, 2, 1, 1))
    assert not torch.equal(*results)
    # beyond the window of every valid key nothing is added
    assert torch.equal(results[1][:, :, :, 8], torch.tensor([0.0, 3.0]).double().view(1, 2, 1).expand(2, 2, 16))


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    more=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_replicate_is_edge_padding(shape, more, seed):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))
    more = more[: len(shape)]
    size = [n + m for n, m in zip(shape, more, strict=True)]
    padded = nn.functional.pad(x, [p for m in reversed(more) for p in (0, m)], mode="replicate")
    assert torch.equal(replicate(x, shape, size), padded)
    assert torch.equal(replicate(padded, shape, size), padded)


def test_unit_norm_gives_every_group_the_same_length():
    norm = MoV(3, 4, 3, heads=2, group_channels=8).norm
    x = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.1, 100.0]).repeat_interleave(8).view(1, 16, 1, 1, 1)
    length = norm(x).unflatten(1, (2, 8)).norm(dim=2)
    torch.testing.assert_close(length, torch.full_like(length, norm.length[0].item()), rtol=0.05, atol=0)
    # 25: the score of two equal groups, by which the softmax starts sharp
    torch.testing.assert_close(norm.length.square() / 8**0.5, torch.full((2,), 25.0))
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


def test_errors_name_the_argument():
    strides = ((4, 4), (2, 2), (1, 1))
    with pytest.raises(ValueError, match=r"`heads` must have 1 to 3 entries.*got \(1, 1, 1, 1\)"):
        VectorPyramid((4, 4, 4), strides, 3, (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"`strides` must have 2 entries"):
        VectorPyramid((4, 4), strides, 3, (1,))
    with pytest.raises(
        ValueError, match=r"each of `strides` must be a multiple of the next, got \(\(3, 3\), \(2, 2\)\)"
    ):
        VectorPyramid((4, 4), ((3, 3), (2, 2)), 3, (1, 1))
    with pytest.raises(ValueError, match=r'`norm` must be "unit" or "group", got \'batch\''):
        VectorPyramid((4,), ((1, 1),), 3, (1,), norm="batch")


@pytest.mark.parametrize(
    ("strides", "window"), [(((4, 4), (2, 2), (1, 1)), 3), (((4, 2), (2, 1)), (3, 5)), (((2, 3, 1), (1, 1, 1)), 3)]
)
def test_receptive_field_is_what_the_flow_depends_on(strides, window):
    """Whatever the coarse levels say, the voxels of view a's finest features that the flow at a voxel depends on."""
    d, finest = len(strides[0]), strides[-1]
    pyramid = VectorPyramid((4,) * len(strides), strides, window, (1,) * len(strides), 4).double()
    size = [3 * r // c * c for r, c in zip(pyramid.receptive_field, strides[0], strict=True)]
    b, a = features((4,) * len(strides), strides, size, 1, batch=1), features((4,) * len(strides), strides, size, 2, 1)
    a[-1].requires_grad_()
    at = tuple(n // 2 for n in b[-1].shape[2:])
    touched = torch.zeros(b[-1].shape[2:], dtype=torch.bool)
    for sign in (-1.0, 0.0, 1.0):
        for mov in pyramid.levels[:-1]:  # each says one edge of its window, or nothing
            flow = sign * torch.tensor([n // 2 for n in mov.window]).double().view(1, -1, *[1] * d)
            mov.forward = lambda b, a, mask=None, flow=flow: flow.expand(1, -1, *b.shape[2:]).contiguous()
        flow = pyramid(b, a)[-1]
        (grad,) = torch.autograd.grad(flow[(0, slice(None), *at)].sum(), a[-1])
        touched |= (grad[0] != 0).any(0)
    seen = touched.nonzero()
    for axis, field in enumerate(pyramid.receptive_field):
        low, high = seen[:, axis].min().item(), seen[:, axis].max().item()
        assert at[axis] - low == high - at[axis]
        # in voxels of the input; of a finest level that is coarser, from one voxel's centre to the other's
        assert (high - low) * finest[axis] + 1 == field


def test_cost_counts_what_the_levels_do():
    pyramid = VectorPyramid((6, 5), ((2, 4), (1, 2)), (3, 5), (2, 1), 3)
    coarse, fine = pyramid.cost((6, 8))
    # 3 rows and 2 columns; 7 pairs of rows at most one apart, 4 of columns at most two apart, 2 groups of 3 channels
    assert coarse == ((3, 2), 2 * 7 * 4, 2 * 6 * 6 * 6, 2 * 7 * 4 * 3, 0, 0)
    # 6 rows and 4 columns; 16 and 14 pairs, 1 group
    assert fine == ((6, 4), 16 * 14, 2 * 24 * 5 * 3, 16 * 14 * 3, 24 * 4 * 3, 24 * 4 * 2)
    assert fine.multiply_adds == sum(fine[2:])


@pytest.mark.parametrize("size", [384, (384,), (0, 4), (4, 4, 4)])
def test_cost_names_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="cost: `size` must be 2 numbers above 0"):
        VectorPyramid((16, 8), ((2, 2), (1, 1)), heads=(1, 1)).cost(size)


def test_the_papers_pyramid_costs_a_fiftieth_of_a_direct_window():
    strides = tuple((2**level,) * 2 for level in reversed(range(5)))
    pyramid = VectorPyramid((512, 256, 128, 64, 32), strides, 5)
    direct = VectorPyramid((32,), ((1, 1),), 121, (1,))
    assert min(pyramid.receptive_field) >= 121 == direct.receptive_field[0]
    most, least = (sum(cost.multiply_adds for cost in p.cost((384, 384))) for p in (direct, pyramid))
    assert most / least == pytest.approx(52, rel=0.1)  # the paper's figure, whose image size is not known
