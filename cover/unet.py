"""The plain U-Net of the paper, in 2D and 3D, which returns the feature maps of its decoder."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cover_kernels.checks import per_axis

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm for any channel count: as many groups as divide it, up to 8, of at least 4 channels where it has 4.

    Smaller groups would turn a coarsest level of a single voxel into a constant.
    """
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels >= 4 * g)), channels)


class Stage(nn.Sequential):
    """Twice convolution (3 voxels wide), GroupNorm and LeakyReLU, of the map that `prepare` makes of the maps given.

    recompute: keep for the backward what the convolutions give, and make anew what lies between them.
    """

    def __init__(self, d: int, in_channels: int, out_channels: int, prepare: Callable[..., Tensor]):
        layers = []
        for channels in (in_channels, out_channels):
            # a bias would be removed again by the normalisation
            convolution = CONV[d](channels, out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, a=0.01, nonlinearity="leaky_relu")
            # in place: the backward of neither neighbour needs what is overwritten
            layers += [convolution, group_norm(out_channels), nn.LeakyReLU(0.01, inplace=True)]
        super().__init__(*layers)
        self.prepare = prepare
        self.recompute = False

    def forward(self, *maps: Tensor) -> Tensor:
        first, norm, activation, second, last_norm, last_activation = self
        # a convolution at the end does not run again: its input is all that its backward wants
        x = again(self.recompute, lambda *maps: first(self.prepare(*maps)), *maps)
        x = again(self.recompute, lambda x: second(activation(norm(x))), x)
        return last_activation(last_norm(x))


def again(recompute: bool, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """`function(*maps)`, of which the backward keeps nothing but `maps` where it may run the function again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *maps, use_reentrant=False)
    return function(*maps)


def _given(x: Tensor) -> Tensor:
    return x


def _pool(d: int, stride: list[int], x: Tensor) -> Tensor:
    return _MAX_POOL[d](x, stride)


def _join(d: int, stride: list[int], skip: Tensor, coarse: Tensor) -> Tensor:
    return torch.cat((skip, F.interpolate(coarse, scale_factor=stride, mode=LINEAR[d])), dim=1)


class UNet(nn.Module):
    """Encoder with max-pooling, decoder with linear upsampling and skip connections, two convolutions per level.

    Args:
        d: 2 or 3, spatial dimensions.
        in_channels: channels of the image.
        channels: features of each level, fine to coarse, one number per level; the paper has (32, 64, 128, 256, 512).
        strides: pooling between neighbouring levels, fine to coarse, `len(channels) - 1` of them, each an int or one
            int per axis in array order; default 2 everywhere. For thick slices, (1, 2, 2) leaves the first axis as is.

    Attributes:
        channels: features of the maps that `forward` returns, coarse to fine.
        strides: their strides to the input, one tuple of d ints per map, coarse to fine.
        recompute: what the backward makes anew, to keep less: "off"; "norms", all between the convolutions; "stages",
            all inside of a stage.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d: int,
        in_channels: int,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int | Sequence[int]] | None = None,
    ):
        super().__init__()
        if d not in (2, 3):
            raise ValueError(f"UNet: `d` must be 2 or 3, got {d!r}")
        if not channels or any(c < 1 for c in (in_channels, *channels)):
            raise ValueError(
                f"UNet: `in_channels` and `channels` must be positive, with one number per level, got {in_channels} "
                f"and {tuple(channels)}"
            )
        strides = [2] * (len(channels) - 1) if strides is None else strides
        if len(strides) != len(channels) - 1:
            raise ValueError(f"UNet: `strides` must have {len(channels) - 1} entries, got {tuple(strides)}")
        self.d = d
        self.recompute = "off"
        pooling = [per_axis("UNet", "strides", stride, d) for stride in strides]
        before = [_given, *(partial(_pool, d, stride) for stride in pooling)]
        self.encoder = nn.ModuleList(
            Stage(d, i, o, prepare)
            for (i, o), prepare in zip(itertools.pairwise((in_channels, *channels)), before, strict=True)
        )
        self.decoder = nn.ModuleList(
            Stage(d, fine + coarse, fine, partial(_join, d, stride))
            for (coarse, fine), stride in zip(itertools.pairwise(reversed(channels)), reversed(pooling), strict=True)
        )
        to_input = itertools.accumulate(
            pooling, lambda s, t: [i * j for i, j in zip(s, t, strict=True)], initial=[1] * d
        )
        self.channels = tuple(reversed(channels))
        self.strides = tuple(tuple(stride) for stride in reversed(list(to_input)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of every level, coarse to fine; the coarsest is the bottleneck.

        Args:
            x: [B, in_channels, *S]; every axis a multiple of `strides[0]`.

        Returns:
            One [B, channels[l], *(S / strides[l])] per level.

        Raises:
            ValueError: the spatial shape of `x` is not such a multiple.
        """
        if x.dim() != self.d + 2 or any(size % s for size, s in zip(x.shape[2:], self.strides[0], strict=True)):
            raise ValueError(
                f"UNet: `x` must be [B, in_channels, *S], S a multiple of {self.strides[0]}, got {list(x.shape)}"
            )
        for stage in (*self.encoder, *self.decoder):
            stage.recompute = self.recompute != "off"
        whole = self.recompute == "stages"
        skips = []
        for stage in self.encoder:
            x = again(whole, stage, x)
            skips.append(x)
        features = [skips.pop()]
        for stage in self.decoder:
            features.append(again(whole, stage, skips.pop(), features[-1]))
        return features
