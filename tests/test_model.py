"""COVER as a whole: any size, backbone and number of channels; what it predicts, learns, compiles to and refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cover.config import Config, replace
from cover.model import COVER, build_model
from cover.pyramid import VectorPyramid
from cover_kernels import warp


def small(d=2, **changes):
    settings = {"channels": (4, 8, 8), "heads": (2, 2, 1), "window": 3, "group_channels": 4, "crop": (16,) * d}
    torch.manual_seed(0)
    return build_model(replace(Config(), **settings | changes))


def smooth(batch, *size, seed=0):
    """Smooth random images, [batch, 1, *size]."""
    x = torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(seed))
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(size)]
    for _ in range(2):
        x = pool(x, 3, stride=1, padding=1)
    return x / x.std()


@settings(max_examples=25, deadline=None)
@given(
    size=st.lists(st.integers(1, 13), min_size=2, max_size=3),
    in_channels=st.integers(1, 3),
    levels=st.integers(1, 3),
    used=st.integers(1, 3),
    norm=st.sampled_from(["unit", "group"]),
    mask_outside=st.booleans(),
)
def test_takes_any_size_and_any_number_of_levels_and_channels(size, in_channels, levels, used, norm, mask_outside):
    d, used = len(size), min(levels, used)
    model = small(
        d,
        channels=(4,) * levels,
        heads=(2,) * used,
        in_channels=in_channels,
        norm=norm,
        mask_outside=mask_outside,
    )
    a, b = torch.randn(2, 2, in_channels, *size)
    flow, flows, features_a, features_b = model(a, b)
    assert flow.shape == (2, d, *size) and flow.isfinite().all()
    sizes = [[-(-n // 2**level) for n in size] for level in reversed(range(levels))]
    assert [list(x.shape[2:]) for x in flows] == sizes[-used:]
    for features in (features_a, features_b):
        assert [list(x.shape) for x in features] == [[2, 4, *s] for s in sizes]
    assert torch.equal(flow, flows[-1])


def test_a_view_beside_itself_has_not_moved():
    model = small(3).double()
    for level in model.pyramid.levels:
        # a softmax that takes the best key alone, and groups of one length even where the features are near zero
        level.norm.length.data.fill_(1e5)
        level.project.weight.data.mul_(1e6)
    # padded on two axes: that invents no displacement at a border either
    x = torch.randn(1, 1, 9, 13, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x, x).flow, torch.zeros(1, 3, 9, 13, 12).double(), rtol=0, atol=1e-6)


def test_samples_do_not_see_each_other():
    model = small().double()
    a, b = smooth(3, 10, 14).double(), smooth(3, 10, 14, seed=1).double()
    together = model(a, b).flow
    alone = torch.cat([model(a[i : i + 1], b[i : i + 1]).flow for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


class Pooled(nn.Module):
    """A backbone without weights: the image averaged over 4 and over 2 voxels."""

    channels = (1, 1)
    strides = ((4, 4), (2, 2))

    def forward(self, x):
        return [F.avg_pool2d(x, 4), F.avg_pool2d(x, 2)]


def test_any_backbone_that_keeps_the_contract():
    model = COVER(Pooled(), VectorPyramid(Pooled.channels, Pooled.strides, 3, (1, 1), 4))
    a, b = smooth(1, 21, 16), smooth(1, 21, 16, seed=1)
    flow, flows, *_ = model(a, b)
    assert [tuple(x.shape[2:]) for x in flows] == [(6, 4), (11, 8)]
    assert flow.shape == (1, 2, 21, 16)
    # Up(psi): half-pixel centres, in voxels of the finer level; the padding takes the value of the edge
    padded = torch.cat((flows[-1], flows[-1][:, :, -1:]), 2)
    expected = 2 * F.interpolate(padded, scale_factor=2, mode="bilinear")[:, :, :21]
    torch.testing.assert_close(flow, expected)
    assert model.pyramid.reach == (6.0, 6.0)


def test_every_parameter_learns():
    model = small(3)
    model(smooth(1, 9, 8, 8), smooth(1, 9, 8, 8, seed=1)).flow.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


def test_learns_random_shifts():
    model = small(channels=(8, 8), heads=(2, 2), window=5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inner = (..., slice(3, -3), slice(3, -3))
    losses = []
    for step in range(40):
        x = smooth(4, 26, 26, seed=step)
        shift = torch.randint(-3, 4, (4, 2, 1, 1), generator=torch.Generator().manual_seed(step)).float()
        flow = shift.expand(4, 2, 26, 26).contiguous()
        # view b shows what lies 3 voxels outside view a; the loss looks at what both show
        a, b = x[inner], warp(x, flow)[inner]
        loss = (model(a, b).flow - flow[inner])[inner].abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # predicting zero gives the mean of |-3 ... 3|, 12 / 7
    assert sum(losses[-10:]) / 10 < 0.5 * 12 / 7


def test_float64_agrees_with_float32():
    model = small(3)
    a, b = smooth(1, 7, 9, 8), smooth(1, 7, 9, 8, seed=1)
    single = model(a, b).flow
    double = model.double()(a.double(), b.double()).flow
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


def test_compiles_without_graph_breaks():
    model = small(channels=(4, 8), heads=(1, 1))
    a, b = smooth(1, 7, 8), smooth(1, 7, 8, seed=1)

    def gradients(function):
        model.zero_grad()
        prediction = function(a, b)
        prediction.flow.square().mean().backward()
        return prediction.flow, [p.grad for p in model.parameters()]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for expected, found in zip(gradients(model), gradients(compiled), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    model = small()
    with pytest.raises(ValueError, match=r"`a` and `b` must be.*\[1, 1, 8, 8\] and \[1, 1, 8, 9\]"):
        model(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 9))
    with pytest.raises(ValueError, match=r"S of 2 axes, got \[1, 1, 8, 8, 8\]"):
        model(torch.randn(1, 1, 8, 8, 8), torch.randn(1, 1, 8, 8, 8))
