"""Random displacement vector fields (DVFs): affine, smooth non-rigid, flips, and their composition, in batch.

The point p of view b shows the point T(p) = p + psi(p) of the image, in voxels of view a, with

    T(p) = c + t + F R H D (p + u(p) - c)

c centre of the crop, D anisotropic scale, H shear, R rotation, F flips, t translation, u cubic B-spline. The
matrix A = F R H D also acts on the control points of u, for splines are linear in them, so that

    psi(p) = (A u)(p) + (A - I)(p - c) + t

is evaluated without interpolating any field, and is zero bit for bit where the draws are zero.
"""

import functools
import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from cover.config import DVFConfig
from cover.rng import Draws


def _spline_weights(x: Tensor) -> Tensor:
    """The four cubic B-spline weights at the fraction `x` [n] of a knot interval, [4, n]."""
    return torch.stack([(1 - x) ** 3, 3 * x**3 - 6 * x**2 + 4, -3 * x**3 + 3 * x**2 + 3 * x + 1, x**3]) / 6


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers as a tensor [n], dtype and device of `like`: filled there, for a copy would wait for the device."""
    return torch.stack([like.new_full((), value) for value in values])


class RandomDVF:
    """Draws displacement fields for views of one size.

    Args:
        config: the ranges.
        crop: S, spatial shape of a view, (H, W) or (D, H, W), in voxels.

    Raises:
        ValueError: `crop` has not 2 or 3 axes, or `shear` is too large to be inverted.
    """

    def __init__(self, config: DVFConfig, crop: tuple[int, ...]):
        if len(crop) not in (2, 3) or any(size < 1 for size in crop):
            raise ValueError(f"RandomDVF: `crop` must be 2 or 3 positive sizes, got {crop!r}")
        # beyond it the shears of one axis may add up to a matrix without inverse
        limit = 1 / (len(crop) - 1)
        if config.shear >= limit:
            raise ValueError(f"RandomDVF: `shear` must be below {limit:g} in {len(crop)}D, got {config.shear}")
        self.config = config
        self.crop = tuple(crop)

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels, per axis, by which p + psi(p) may leave the crop on either side: a bound that no draw exceeds.

        The box that holds all p + u(p) - c is followed through D, H and R: after each, its half widths. Flips map the
        crop onto itself and need no context.
        """
        c = self.config
        half = [((size - 1) / 2 + c.nonrigid) * (1 + c.scale) for size in self.crop]
        half = [(1 - c.shear) * h + c.shear * sum(half) for h in half]
        margin = []
        for i, (size, h) in enumerate(zip(self.crop, half, strict=True)):
            # row i of R is a unit vector at most `rotation` away from axis i: the best it can do is to lean towards
            # the box's corner
            others = math.hypot(*half[:i], *half[i + 1 :])
            angle = min(math.radians(c.rotation), math.atan2(others, h))
            reached = math.cos(angle) * h + math.sin(angle) * others + c.translation * size
            margin.append(max(0, math.ceil(reached - (size - 1) / 2)))
        return tuple(margin)

    def _rotation(self, draws: Draws) -> Tensor:
        """R, float64 [B, d, d]: in 3D, rotation vectors uniform in a ball, so that no axis is special."""
        d = len(self.crop)
        planes = list(combinations(range(d), 2))
        axis = F.normalize(draws.normal("rotation axis", len(planes)).double())
        angle = math.radians(self.config.rotation) * draws.uniform("rotation").double() ** (1 / len(planes))
        turn = axis.new_zeros(len(axis), d, d)
        for component, (i, j) in zip(axis.unbind(1), planes, strict=True):
            turn[:, i, j], turn[:, j, i] = -component, component
        # Rodrigues' formula
        angle = angle.view(-1, 1, 1)
        return torch.eye(d, device=axis.device) + angle.sin() * turn + (1 - angle.cos()) * (turn @ turn)

    def _matrix(self, draws: Draws) -> Tensor:
        """A = F R H D, float64 [B, d, d]: rounded once, at the end."""
        c, d = self.config, len(self.crop)
        factors = 1 + c.scale * draws.uniform("scale", d, low=-1).double()
        eye = torch.eye(d, dtype=torch.float64, device=draws.device)
        shears = eye + c.shear * draws.uniform("shear", d, d, low=-1).double() * (1 - eye)
        flips = torch.where(draws.uniform("flip", d) < c.flip, -1.0, 1.0)
        return flips[:, :, None] * (self._rotation(draws) @ (shears * factors[:, None, :]))

    def _spline(self, control: Tensor, axes: list[Tensor]) -> Tensor:
        """The B-spline with these control points [B, d, *G] at the product of the coordinates `axes`: [B, d, *S]."""
        for axis, position in enumerate(axes, start=2):
            position = position.double() / self.config.control_spacing
            knot = position.floor()
            shape = [-1 if i == axis else 1 for i in range(control.dim())]
            # tap by tap: a matrix product may round differently from one batch size to another
            taps = (
                control.index_select(axis, knot.long() + tap).mul_(weight.view(shape))
                for tap, weight in enumerate(_spline_weights(position - knot).float())
            )
            control = functools.reduce(Tensor.add_, taps)
        return control

    def __call__(self, draws: Draws, axes: list[Tensor] | None = None) -> Tensor:
        """The fields of a batch of samples.

        Args:
            draws: the random numbers of B samples.
            axes: coordinates along every axis at which the fields are wanted, in voxels, inside [0, size - 1];
                default every voxel of the crop.

        Returns:
            psi, float32 [B, d, *S], voxels; component i moves along spatial axis i.
        """
        c, d, device = self.config, len(self.crop), draws.device
        axes = axes or [torch.arange(size, dtype=torch.float32, device=device) for size in self.crop]
        matrix = self._matrix(draws)
        knots = [math.floor((size - 1) / c.control_spacing) + 4 for size in self.crop]
        control = c.nonrigid * draws.uniform("nonrigid", d, *knots, low=-1)
        # elementwise products for the same reason as in _spline: [B, d] times [B, 1, ...], column by column
        columns = matrix.float().view(*matrix.shape, *[1] * d).unbind(2)
        control = sum(column * u.unsqueeze(1) for column, u in zip(columns, control.unbind(1), strict=True))
        moved = draws.uniform("translation", d, low=-1)
        shift = c.translation * constant(self.crop, moved) * moved
        affine = shift.view(-1, d, *[1] * d)
        moves = (matrix - torch.eye(d, device=device)).float().view(*matrix.shape, *[1] * d).unbind(2)
        for i, (move, position) in enumerate(zip(moves, axes, strict=True)):
            from_centre = position - (self.crop[i] - 1) / 2
            affine = affine + move * from_centre.view([-1 if axis == i else 1 for axis in range(d)])
        return self._spline(control, axes).add_(affine)
