"""MoV and the vector pyramid (VPA): from the feature maps of two views to the displacement between them."""

import itertools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cover.unet import CONV
from cover_kernels import compose, veu, warp
from cover_kernels.checks import per_axis
from cover_kernels.problems import window_pairs

# VEU's score for two equal groups at the start. A softmax that starts near uniform gives the mean of its window, not
# the match: of 3, 11, 25 and 45 the upper two learned fastest, with a third less error than GroupNorm(1): docs/model.md
_SHARPNESS = 25.0


class UnitNorm(nn.Module):
    """Gives every group of channels the same length at every voxel: [B, J*C, *S] to the same shape.

    The length is learned, one per group: it sets how sharp the softmax over the window can be.
    """

    def __init__(self, heads: int, group_channels: int):
        super().__init__()
        # a score is the squared length over tau = sqrt(C)
        self.length = nn.Parameter(torch.full((heads,), (_SHARPNESS * group_channels**0.5) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (len(self.length), -1))
        # 1e-3 bounds the gradient where all features of a voxel are near zero
        inverse = (x.square().sum(2, keepdim=True) + 1e-3).rsqrt()
        return (x * (inverse * self.length.view(-1, 1, *[1] * (x.dim() - 3)))).flatten(1, 2)


class MoV(nn.Module):
    """Mixture of Vectors of one level: 1x1 projection, normalisation, VEU and MVI, the same weights for both views.

    A linear projection commutes with a warp: call `project` first, warp its few channels, then call the module, which
    adds the bias. The result is that of warping the features and projecting them with the bias; the traffic is less.

    Args:
        d: 2 or 3, spatial dimensions.
        in_channels: features of the level.
        window: N, odd, in voxels of the level; or one per axis.
        heads: J, the number of vector groups.
        group_channels: C, the channels of one group.
        norm: "unit" (`UnitNorm`, every voxel by itself) or "group" (`GroupNorm(1, J*C)`, over the whole image).

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d: int,
        in_channels: int,
        window: int | Sequence[int],
        heads: int,
        group_channels: int,
        norm: str = "unit",
    ):
        super().__init__()
        if norm not in ("unit", "group"):
            raise ValueError(f'MoV: `norm` must be "unit" or "group", got {norm!r}')
        channels = heads * group_channels
        self.window = tuple(per_axis("MoV", "window", window, d))
        self.heads = heads
        self.project = CONV[d](in_channels, channels, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * d))
        self.norm = UnitNorm(heads, group_channels) if norm == "unit" else nn.GroupNorm(1, channels)

    def forward(self, b: Tensor, a: Tensor, mask: Tensor | None = None) -> Tensor:
        """Displacement from view b to view a at every voxel.

        Args:
            b, a: what `project` made of the two views, [B, J*C, *S]; `a` may have been warped since.
            mask: bool [B, 1, *S], True where a voxel of `a` takes part.

        Returns:
            v, [B, d, *S], in voxels of the level.
        """
        return veu(self.norm(b + self.bias), self.norm(a + self.bias), self.window, self.heads, mask=mask)


def replicate(x: Tensor, real: Sequence[int], size: Sequence[int]) -> Tensor:
    """The first `real` voxels of x [B, C, *S] along each axis, followed by copies of the last one up to `size`."""
    for axis, (n, total) in enumerate(zip(real, size, strict=True), start=2):
        x = x.narrow(axis, 0, n)
        if total > n:
            edge = x.narrow(axis, n - 1, 1)
            x = torch.cat((x, edge.expand(*x.shape[:axis], total - n, *x.shape[axis + 1 :])), axis)
    return x


def real_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Voxels of a level that hold at least a part of the first `size` voxels of the input, per axis."""
    return tuple(-(-n // s) for n, s in zip(size, stride, strict=True))


class Cost(NamedTuple):
    """What one level of a pyramid computes to compare one pair of views: pairs, and multiply-adds by what they are for.

    size: of the level, in voxels. pairs: of a query and a key inside its window and the image, over all groups.
    projection: 1x1 convolutions of both views. veu: scores. warp, compose: interpolation.
    """

    size: tuple[int, ...]
    pairs: int
    projection: int
    veu: int
    warp: int
    compose: int

    @property
    def multiply_adds(self) -> int:
        return self.projection + self.veu + self.warp + self.compose


class VectorPyramid(nn.Module):
    """Vector Pyramid Aggregation: a MoV per level, each starting from what the coarser levels know.

    Args:
        channels: features of the backbone's maps, coarse to fine.
        strides: their strides to the input, one int per axis each, coarse to fine; each a multiple of the next.
        window: N, odd, in voxels of each level; an int or one per axis.
        heads: J of each level, coarse to fine. Shorter than `channels`: only the finest levels form the pyramid.
        group_channels: C, the channels of one vector group.
        mask_outside: leave keys that were sampled from outside view a out of the softmax. That is its padding, if
            there is any, and nothing else: p + flow(p) is a mean of positions inside view a (docs/model.md).
        norm: see `MoV`.

    Attributes:
        reach: the largest displacement that can be expressed, in voxels of the input, one per axis:
            (N - 1) / 2 times the sum of the strides.
        receptive_field: the effective one, in voxels of the input, one per axis: how many voxels of view a the
            displacement at a voxel can depend on, 2 reach + 1. (COVER, "Vector Pyramid Aggregation".)

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        window: int | Sequence[int] = 7,
        heads: Sequence[int] = (4, 4, 4, 1, 1),
        group_channels: int = 8,
        mask_outside: bool = False,
        norm: str = "unit",
    ):
        super().__init__()
        if len(strides) != len(channels):
            raise ValueError(f"VectorPyramid: `strides` must have {len(channels)} entries, got {tuple(strides)}")
        if not 1 <= len(heads) <= len(channels):
            raise ValueError(
                f"VectorPyramid: `heads` must have 1 to {len(channels)} entries, one per level of the backbone, "
                f"got {tuple(heads)}"
            )
        self.strides = tuple(tuple(stride) for stride in strides[-len(heads) :])
        for coarse, fine in itertools.pairwise(self.strides):
            if any(c % f for c, f in zip(coarse, fine, strict=True)):
                raise ValueError(f"VectorPyramid: each of `strides` must be a multiple of the next, got {strides}")
        d = len(self.strides[0])
        self.mask_outside = mask_outside
        self.levels = nn.ModuleList(
            MoV(d, c, window, j, group_channels, norm) for c, j in zip(channels[-len(heads) :], heads, strict=True)
        )
        total = [sum(axis) for axis in zip(*self.strides, strict=True)]
        self.reach = tuple(float(n // 2 * s) for n, s in zip(self.levels[0].window, total, strict=True))
        self.receptive_field = tuple(2 * int(r) + 1 for r in self.reach)

    def cost(self, size: Sequence[int]) -> list[Cost]:
        """What each level computes, coarse to fine, to compare one pair of views of `size` voxels, per axis.

        Raises:
            ValueError: `size` is not a number of voxels above 0 for each axis.
        """
        axes = len(self.strides[0])
        if not isinstance(size, Sequence) or len(size) != axes or min(size) < 1:
            raise ValueError(f"VectorPyramid.cost: `size` must be {axes} numbers above 0, got {size!r}")
        costs = []
        for mov, stride in zip(self.levels, self.strides, strict=True):
            S = real_size(size, stride)
            voxels, corners, d = prod(S), 2 ** len(S), len(S)
            features, channels = mov.project.in_channels, mov.project.out_channels
            pairs = mov.heads * window_pairs(S, mov.window)
            costs.append(
                Cost(
                    size=S,
                    pairs=pairs,
                    projection=2 * voxels * features * channels,
                    veu=pairs * channels // mov.heads,
                    warp=voxels * corners * channels if costs else 0,  # the coarsest level starts from nothing
                    compose=voxels * corners * d if costs else 0,
                )
            )
        return costs

    def forward(
        self, features_b: Sequence[Tensor], features_a: Sequence[Tensor], size: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Displacement from view b to view a on every level of the pyramid.

        Args:
            features_b, features_a: the backbone's maps of the two views, coarse to fine, [B, channels[l], *S_l] each.
            size: how many voxels of the input, per axis, are image, with padding behind them; default all. Padding
                holds no keys, and gets the displacement of the image's last voxel beside it.

        Returns:
            One [B, d, *S_l] per level of the pyramid, coarse to fine, in voxels of its level.
        """
        flows = []
        finest = slice(-len(self.levels), None)
        for i, (mov, b, a) in enumerate(zip(self.levels, features_b[finest], features_a[finest], strict=True)):
            S = tuple(b.shape[2:])
            real = S if size is None else real_size(size, self.strides[i])
            mask = None
            if real != S:
                mask = torch.zeros((len(a), 1, *S), dtype=torch.bool, device=a.device)
                mask[(..., *map(slice, real))].fill_(True)
            b, a = mov.project(b), mov.project(a)
            if not flows:
                flow = mov(b, a, mask)
            else:
                stride = tuple(c // f for c, f in zip(self.strides[i - 1], self.strides[i], strict=True))
                if self.mask_outside and mask is not None:
                    # nothing of what a key is interpolated from may be padding; 1e-3 is room for rounding
                    mask = mask & (warp(mask.to(a.dtype), flows[-1].detach(), stride) > 1 - 1e-3)
                flow = compose(flows[-1], mov(b, warp(a, flows[-1], stride), mask), stride)
            flows.append(replicate(flow, real, S))
        return flows
