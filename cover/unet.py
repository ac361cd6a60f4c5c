"""The plain U-Net of the paper, in 2D and 3D, which returns the feature maps of its decoder."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cover_kernels.checks import per_axis

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm for any channel count: as many groups as divide it, up to 8, of at least 4 channels where it has 4.

    Smaller groups would turn a coarsest level of a single voxel into a constant.
    """
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels >= 4 * g)), channels)


def _blocks(d: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice convolution (3 voxels wide), GroupNorm and LeakyReLU."""
    layers = []
    for channels in (in_channels, out_channels):
        # a bias would be removed again by the normalisation
        convolution = CONV[d](channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, a=0.01, nonlinearity="leaky_relu")
        # in place: the backward of neither neighbour needs what is overwritten
        layers += [convolution, group_norm(out_channels), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers)


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
        recompute: keep the output of each stage only, and run it again in the backward.

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
        self.recompute = False
        self.pooling = [per_axis("UNet", "strides", stride, d) for stride in strides]
        self.encoder = nn.ModuleList(_blocks(d, i, o) for i, o in itertools.pairwise((in_channels, *channels)))
        self.decoder = nn.ModuleList(
            _blocks(d, fine + coarse, fine) for coarse, fine in itertools.pairwise(reversed(channels))
        )
        to_input = itertools.accumulate(
            self.pooling, lambda s, t: [i * j for i, j in zip(s, t, strict=True)], initial=[1] * d
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
        skips = [self._stage(self.encoder[0], x)]
        for blocks, stride in zip(self.encoder[1:], self.pooling, strict=True):
            skips.append(self._stage(self._down, blocks, stride, skips[-1]))
        features = [skips.pop()]
        for blocks, stride in zip(self.decoder, reversed(self.pooling), strict=True):
            features.append(self._stage(self._up, blocks, stride, skips.pop(), features[-1]))
        return features

    def _stage(self, function, *arguments) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _down(self, blocks: nn.Module, stride: list[int], x: Tensor) -> Tensor:
        return blocks(_MAX_POOL[self.d](x, stride))

    def _up(self, blocks: nn.Module, stride: list[int], skip: Tensor, coarse: Tensor) -> Tensor:
        up = F.interpolate(coarse, scale_factor=stride, mode=LINEAR[self.d])
        return blocks(torch.cat((skip, up), dim=1))
