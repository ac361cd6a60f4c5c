"""Appearance changes t(x): gamma, contrast, brightness, blur, noise and in-painted patches, in batch on the device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cover.config import AppearanceConfig
from cover.rng import Draws


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with a width of its own for every sample; the border is repeated.

    Args:
        x: float [B, C, *S].
        sigma: [B], standard deviations, voxels; 0 leaves a sample as it is, bit for bit.
        radius: voxels at which the kernel is cut off; four sigma lose nothing visible.
    """
    d = x.dim() - 2
    offsets = torch.arange(radius + 1, device=x.device)
    exponent = -0.5 * (offsets / sigma[:, None].clamp(min=1e-6)) ** 2
    weights = exponent.exp()
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    centre, *sides = weights.to(x.dtype).view(len(sigma), -1, 1, *[1] * d).unbind(1)
    for axis in range(2, x.dim()):
        size = x.shape[axis]
        ends = [0, 0] * (x.dim() - 1 - axis) + [radius, radius] + [0, 0] * (axis - 2)
        padded = F.pad(x, ends, mode="replicate")
        x = x * centre
        for offset, side in enumerate(sides, start=1):
            before, after = (padded.narrow(axis, radius + o, size) for o in (-offset, offset))
            x += (before + after).mul_(side)
    return x


def patch_mask(S: tuple[int, ...], centre: Tensor, width: Tensor) -> Tensor:
    """Union of boxes, bool [B, 1, *S]; centre and width [B, patches, d] are fractions of the axes."""
    inside = True
    for i, size in enumerate(S):
        position = (torch.arange(size, device=centre.device) + 0.5) / size
        near = (position - centre[..., i, None]).abs() < width[..., i, None] / 2
        inside = near.view(*near.shape[:2], *[size if axis == i else 1 for axis in range(len(S))]) & inside
    return inside.any(1, keepdim=True)


class Appearance:
    """Changes the appearance of every sample on its own; geometry stays.

    Each change happens to a sample with probability `appearance` and with an amount drawn from its range. All channels
    of a sample change alike, contrast and gamma about the mean and the range of each channel.
    """

    def __init__(self, config: AppearanceConfig):
        self.config = config

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: Draws, view: str) -> Tensor:
        """t(x) for images [B, C, *S], z-scored; `view` names the draws, so that views of one sample differ."""
        c, d = self.config, x.dim() - 2
        S, spatial = x.shape[2:], tuple(range(2, x.dim()))

        def amount(change: str, low: float) -> Tensor:
            """Drawn from [low, 1], 0 where the change does not happen: [B, 1, ...]."""
            happens = draws.uniform(f"{view} {change} happens") < c.appearance
            drawn = torch.where(happens, draws.uniform(f"{view} {change}", low=low), 0)
            return drawn.view(-1, *[1] * (d + 1))

        gamma = c.gamma * amount("gamma", -1)
        low, high = x.amin(spatial, keepdim=True), x.amax(spatial, keepdim=True)
        span = (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        x = torch.where(gamma == 0, x, low + span * ((x - low) / span) ** gamma.exp())
        x = x + c.contrast * amount("contrast", -1) * (x - x.mean(spatial, keepdim=True))
        x = x + c.brightness * amount("brightness", -1)
        x = gaussian_blur(x, c.blur * amount("blur", 0).flatten(), math.ceil(4 * c.blur))
        grain = draws.normal(f"{view} grain", *x.shape[1:])
        noisy = x + c.noise * amount("noise", 0) * grain
        width = c.inpaint * draws.uniform(f"{view} patch width", c.patches, d)
        width = torch.where(amount("inpaint", 0).view(-1, 1, 1) > 0, width, 0)
        painted = patch_mask(S, draws.uniform(f"{view} patch centre", c.patches, d), width)
        # painted voxels need grain of the image's own mean and spread; theirs is free, for they are not noisy
        mean, spread = x.mean(spatial, keepdim=True), x.std(spatial, keepdim=True, unbiased=False)
        return torch.where(painted, mean + spread * grain, noisy)
