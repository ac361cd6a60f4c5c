"""The two views of self-vector regression (SeVR): x_a = t(x), and x_b(p) = x(p + psi(p)) with psi known exactly."""

import dataclasses
import functools
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from cover.appearance import Appearance
from cover.config import AppearanceConfig, DVFConfig
from cover.dvf import RandomDVF, constant
from cover.rng import Draws

# fit_to_reach: sample fields, points per axis and halvings; the share is then known to about one percent
_FIT_SAMPLES, _FIT_POINTS, _FIT_STEPS = 256, 12, 12


class Views(NamedTuple):
    """Two views of a batch and how they correspond; S is the crop."""

    a: Tensor  # float32 [B, C, *S]
    b: Tensor  # float32 [B, C, *S], b(p) = x(p + flow(p)) before its own change of appearance
    flow: Tensor  # psi, float32 [B, d, *S], voxels of view a
    mask: Tensor  # epsilon, bool [B, 1, *S]: p + flow(p) lies inside view a and inside the real image


def sample(x: Tensor, position: Tensor) -> Tensor:
    """x [B, C, *P] at `position` [B, d, *S] in voxels of x: linear, clamped at the border, float32 [B, C, *S].

    Whole positions give the voxel's value bit for bit, which `grid_sample` does not. `cover_kernels.warp` wants the
    flow on all of x, the context around the crop included: up to ten times the work in 3D.
    """
    size = x.shape[2:]
    flat, fractions, steps = 0, [], []
    for n, at in zip(size, position.unbind(1), strict=True):
        at = at.clamp(0, n - 1)
        low = at.floor().clamp_(max=max(n - 2, 0))
        fractions.append((at - low).unsqueeze(1))
        flat = flat * n + low.long()
        steps = [step * n for step in steps] + [1 if n > 1 else 0]
    flat, voxels = flat.flatten(1).unsqueeze(1), x.flatten(2)
    corners = []
    for corner in product((0, 1), repeat=len(size)):
        index = flat + sum(bit * step for bit, step in zip(corner, steps, strict=True))
        corners.append(voxels.gather(2, index.expand(-1, x.shape[1], -1)).unflatten(2, position.shape[2:]))
    # lerp is exact at weights 0 and 1
    for fraction in reversed(fractions):
        corners = [
            low.lerp_(high, fraction.expand_as(low)) for low, high in zip(corners[::2], corners[1::2], strict=True)
        ]
    return corners[0]


def _inside(position: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Whether `position` [B, d, *S] lies in the box from `first` to `last` [B or 1, d], ends included: [B, 1, *S]."""
    trailing = [1] * (position.dim() - 2)
    inside = (position >= first.view(*first.shape, *trailing)) & (position <= last.view(*last.shape, *trailing))
    return inside.all(1, keepdim=True)


def _add_identity(flow: Tensor, axes: list[Tensor]) -> Tensor:
    """p + flow(p) for a flow [B, d, *S] given at the product of the coordinates `axes`."""
    grid = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([u + p for u, p in zip(flow.unbind(1), grid, strict=True)], 1)


class ViewMaker:
    """Makes two views of every patch of a batch, on the device where the batch lies.

    Args:
        dvf: ranges of the displacement fields (already fitted to the reach, see `fit_to_reach`).
        appearance: ranges of the changes of appearance.
        crop: S, spatial shape of a view, voxels.

    Raises:
        ValueError: see `RandomDVF`.
    """

    def __init__(self, dvf: DVFConfig, appearance: AppearanceConfig, crop: tuple[int, ...]):
        self.dvf = RandomDVF(dvf, crop)
        self.appearance = Appearance(appearance)
        self._changed = {"both": "ab", "none": ""}.get(appearance.views, appearance.views)
        self.crop = tuple(crop)

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels of context per axis that a patch must hold on both sides of the crop."""
        return self.dvf.margin

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> Views:
        """Two views of a batch.

        Args:
            batch: "image" float32 [B, C, *(crop + 2 * margin)], the crop with its context; "extent" float32
                [B, d, 2], the patch coordinates of the first and the last voxel of the real image along each axis.
            draws: the random numbers of these B samples, on the device of the batch.

        Raises:
            ValueError: the patch has not the size of the crop with its margin, or `draws` not the batch's.
        """
        image, extent = batch["image"], batch["extent"]
        expected = tuple(size + 2 * m for size, m in zip(self.crop, self.margin, strict=True))
        if tuple(image.shape[2:]) != expected:
            raise ValueError(
                f"ViewMaker: `image` must be [B, C, *{expected}], the crop {self.crop} with margin {self.margin} on "
                f"each side, got {list(image.shape)}"
            )
        flow = self.dvf(draws)
        if len(flow) != len(image):
            raise ValueError(
                f"ViewMaker: `draws` must be those of the {len(image)} samples of `image`, got {len(flow)}"
            )
        axes = [torch.arange(size, dtype=flow.dtype, device=flow.device) for size in self.crop]
        margin = constant(self.margin, flow)[None]
        position = _add_identity(flow, axes)
        last = constant(self.crop, flow)[None] - 1
        mask = _inside(position, (extent[..., 0] - margin).clamp(min=0), torch.minimum(extent[..., 1] - margin, last))
        views = {
            "a": image[(..., *(slice(m, m + size) for m, size in zip(self.margin, self.crop, strict=True)))],
            "b": sample(image, position.add_(margin.view(1, -1, *[1] * len(axes)))),
        }
        for name in self._changed:
            views[name] = self.appearance(views[name], draws, name)
        return Views(views["a"].contiguous(), views["b"], flow, mask)


def reachable_fraction(flow: Tensor, mask: Tensor, reach: tuple[float, ...]) -> Tensor:
    """Share of the voxels of `mask` whose true vector the pyramid can express, a scalar tensor.

    Args:
        flow: float [B, d, *S], voxels.
        mask: bool [B, 1, *S].
        reach: the largest displacement that the pyramid can express along each axis, voxels of the input.

    Returns:
        float32 scalar; 1 for an empty mask, where nothing is out of reach.
    """
    limit = constant(reach, flow).view(-1, *[1] * (flow.dim() - 2))
    within = (flow.abs() <= limit).all(1, keepdim=True) & mask
    count = mask.sum()
    return torch.where(count == 0, 1.0, within.sum() / count)


@torch.no_grad()
def fit_to_reach(dvf: DVFConfig, crop: tuple[int, ...], reach: tuple[float, ...]) -> DVFConfig:
    """The ranges of `dvf`, shrunk by one common factor until a share `dvf.fit_to_reach` of vectors is within reach.

    The share is that of `reachable_fraction` over a fixed sample of fields at a grid of points of the crop, so that
    the result depends on the arguments only. Rotation, scale, shear, translation and nonrigid shrink;
    `control_spacing` and the probability of flips stay.

    Args:
        dvf: the ranges wanted; returned as they are if they fit, or if their `fit_to_reach` is None.
        crop: S, spatial shape of a view, voxels.
        reach: the largest displacement that the pyramid can express along each axis, voxels.

    Raises:
        ValueError: no factor meets the share, as with flips, which move most voxels beyond any reach.
    """
    target = dvf.fit_to_reach
    if target is None:
        return dvf
    index = torch.arange(_FIT_SAMPLES)
    draws = Draws(0, torch.zeros_like(index), index)
    draws.uniform = functools.cache(draws.uniform)  # the same for every factor
    # the centres of equal cells: every voxel of the crop is represented alike
    axes = [(torch.arange(n := min(_FIT_POINTS, size)) + 0.5) * size / n - 0.5 for size in crop]
    zero, last = torch.zeros(1, len(crop)), torch.tensor([crop]) - 1

    def shrunk(factor: float) -> DVFConfig:
        ranges = ("rotation", "scale", "shear", "translation", "nonrigid")
        return dataclasses.replace(dvf, **{name: factor * getattr(dvf, name) for name in ranges})

    def fits(config: DVFConfig) -> bool:
        flow = RandomDVF(config, crop)(draws, axes)
        mask = _inside(_add_identity(flow, axes), zero, last)
        return reachable_fraction(flow, mask, reach).item() >= target

    if fits(dvf):
        return dvf
    low, high = 0.0, 1.0
    if not fits(shrunk(low)):
        raise ValueError(
            f"fit_to_reach: no ranges put a share {target} of the vectors within reach {tuple(reach)}: "
            f"flips (`flip` is {dvf.flip}) do not shrink. Set flip to 0, or fit_to_reach to None"
        )
    for _ in range(_FIT_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(shrunk(middle)) else (low, middle)
    return shrunk(low)
