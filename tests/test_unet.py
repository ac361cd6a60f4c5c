"""UNet: shapes, strides and features for any channels, levels and pooling, in 2D and 3D."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cover.unet import UNet, group_norm


@st.composite
def networks(draw):
    d = draw(st.sampled_from([2, 3]))
    channels = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    stride = st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 2)] * d))
    strides = draw(st.lists(stride, min_size=len(channels) - 1, max_size=len(channels) - 1))
    return d, draw(st.integers(1, 3)), channels, strides


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 2))
def test_maps_have_the_channels_and_strides_that_the_network_says(network, repeat):
    d, in_channels, channels, strides = network
    unet = UNet(d, in_channels, channels, strides)
    assert unet.channels == tuple(reversed(channels))
    assert unet.strides[-1] == (1,) * d
    per_axis = [(s,) * d if isinstance(s, int) else s for s in strides]
    assert unet.strides[0] == tuple(prod(s[i] for s in per_axis) for i in range(d))
    size = [repeat * s for s in unet.strides[0]]
    maps = unet(torch.randn(2, in_channels, *size))
    assert [list(x.shape) for x in maps] == [
        [2, c, *(n // t for n, t in zip(size, stride, strict=True))]
        for c, stride in zip(unet.channels, unet.strides, strict=True)
    ]


def test_paper_network_is_the_default():
    unet = UNet(2, 1)
    assert unet.channels == (512, 256, 128, 64, 32)
    assert unet.strides == ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
    kinds = [type(module) for module in unet.modules()]
    # two blocks for each of 5 levels down and 4 up
    assert kinds.count(nn.Conv2d) == kinds.count(nn.GroupNorm) == kinds.count(nn.LeakyReLU) == 18
    assert all(m.kernel_size == (3, 3) for m in unet.modules() if isinstance(m, nn.Conv2d))


@given(st.integers(1, 600))
def test_group_norm_takes_any_channel_count(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4
    if channels % 32 == 0:
        assert norm.num_groups == 8


def test_a_bottleneck_of_one_voxel_still_tells_images_apart():
    torch.manual_seed(0)
    coarsest = UNet(2, 1, (4, 8, 8))(torch.randn(2, 1, 4, 4))[0]
    assert coarsest.shape[2:] == (1, 1)
    assert (coarsest[0] - coarsest[1]).abs().max() > 0.1


def test_every_map_depends_on_every_coarser_level_and_on_the_skip():
    torch.manual_seed(0)
    unet = UNet(3, 1, (4, 4, 4))
    unet(torch.randn(1, 1, 8, 8, 8))[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


class Convolutions(TorchDispatchMode):
    """Counts those that run forward."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_what_is_computed_again_keeps_the_bits_and_norms_cost_no_convolution():
    torch.manual_seed(0)
    unet, x = UNet(3, 1, (4, 8, 8)), torch.randn(2, 1, 8, 8, 12)
    gradients, convolutions = {}, {}
    for unet.recompute in ("off", "norms", "stages"):
        unet.zero_grad()
        with Convolutions() as convolutions[unet.recompute]:
            sum(features.square().sum() for features in unet(x)).backward()
        gradients[unet.recompute] = [parameter.grad for parameter in unet.parameters()]
    torch.testing.assert_close(gradients["norms"], gradients["off"], rtol=0, atol=0)
    torch.testing.assert_close(gradients["stages"], gradients["off"], rtol=0, atol=0)
    assert convolutions["norms"].count == convolutions["off"].count == 10 < convolutions["stages"].count


def test_runs_in_float64():
    assert UNet(2, 1, (2, 4)).double()(torch.randn(1, 1, 4, 4, dtype=torch.float64))[-1].dtype == torch.float64


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`d` must be 2 or 3, got 1"):
        UNet(1, 1)
    with pytest.raises(ValueError, match=r"`channels` must be positive.*\(4, 0\)"):
        UNet(2, 1, (4, 0))
    with pytest.raises(ValueError, match=r"`strides` must have 1 entries, got \(2, 2\)"):
        UNet(2, 1, (4, 8), (2, 2))
    with pytest.raises(ValueError, match=r"`strides`.*one per spatial axis, got \(2, 2, 2\)"):
        UNet(2, 1, (4, 8), [(2, 2, 2)])
    unet = UNet(2, 1, (4, 8))
    for shape in ((1, 1, 4, 5), (1, 1, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"`x` must be \[B, in_channels, \*S\], S a multiple of \(2, 2\), got"):
            unet(torch.randn(shape))
