"""L_vec, L_con and the figures that are watched beside them: endpoint error, and the spread of the features.

Shapes: B batch, C channels, d spatial dimensions, S spatial shape; flows [B, d, *S] in voxels, mask bool [B, 1, *S]
(epsilon: the voxels whose match lies inside view a). Shapes that do not fit raise ValueError.
(COVER, "Self-Vector Regression".)
"""

import torch
from torch import Tensor

from cover_kernels import warp

# Added to squared norms: the cosine of a zero vector is 0, and its gradient stays finite.
_EPS = 1e-8


def _check(op: str, names: tuple[str, str], x: Tensor, like: Tensor, mask: Tensor) -> None:
    """Check that `x` has the shape of `like` and `mask` fits both: broadcasting would hide a mistake."""
    if x.shape != like.shape:
        raise ValueError(f"{op}: `{names[0]}` must have the shape of `{names[1]}`, {[*like.shape]}, got {[*x.shape]}")
    expected = [x.shape[0], 1, *x.shape[2:]]
    if mask.dtype != torch.bool or list(mask.shape) != expected:
        raise ValueError(f"{op}: `mask` must be bool {expected} beside `{names[1]}`, got {mask.dtype} {[*mask.shape]}")


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the voxels of `mask`, and the channels, of x [B, n, *S], which is 0 elsewhere; 0 for an empty mask."""
    return x.sum() / (mask.sum() * x.shape[1]).clamp(min=1)


def vector_loss(predicted: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """L_vec: mean absolute error of the components of `predicted` [B, d, *S], in voxels, over the mask; a scalar.

    An empty mask gives 0 and zero gradients. What lies outside the mask, NaN included, does not reach the gradient.
    """
    _check("vector_loss", ("predicted", "flow"), predicted, flow, mask)
    return _masked_mean((predicted - flow).masked_fill(~mask, 0).abs(), mask)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the channels, [B, 1, *S], at least in float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    dot, aa, bb = ((x * y).sum(1, keepdim=True) for x, y in ((a, b), (a, a), (b, b)))
    return dot * (aa + _EPS).rsqrt() * (bb + _EPS).rsqrt()


def consistency_loss(features_b: Tensor, features_a: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """L_con: 1 - mean cosine similarity between F_b and warp(F_a, psi) over the mask; a scalar.

    Args:
        features_b, features_a: [B, C, *S], the finest level of both views, one dtype.
        flow: the true psi, float32 [B, d, *S].
        mask: bool [B, 1, *S]. An empty one gives 0 and zero gradients.
    """
    _check("consistency_loss", ("features_b", "features_a"), features_b, features_a, mask)
    matched = warp(features_a, flow, padding="border")
    return _masked_mean((1 - _cosine(features_b, matched)).masked_fill(~mask, 0), mask)


def epe(predicted: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """Endpoint error |predicted - flow| in voxels, of each voxel of the mask: [mask.sum()], in order of the batch."""
    _check("epe", ("predicted", "flow"), predicted, flow, mask)
    return torch.linalg.vector_norm(predicted - flow, dim=1, keepdim=True)[mask]


def mean_epe(predicted: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """The mean of `epe`, a scalar, 0 for an empty mask; unlike the errors themselves its shape is known beforehand."""
    _check("mean_epe", ("predicted", "flow"), predicted, flow, mask)
    errors = torch.linalg.vector_norm(predicted - flow, dim=1, keepdim=True)
    return _masked_mean(errors.masked_fill_(~mask, 0), mask)


@torch.no_grad()
def feature_variance(features: Tensor) -> Tensor:
    """How far the features [B, C, *S] are from collapse: 0 when all voxels share one direction, 1 when all differ.

    Mean over the channels of the standard deviation, over batch and voxels, of the unit-length features, times
    sqrt(C): 1 for directions spread evenly over the sphere. A scalar, float32.
    """
    x = features.float()
    x = x * ((x * x).sum(1, keepdim=True) + _EPS).rsqrt()
    return x.transpose(0, 1).flatten(1).std(1, unbiased=False).mean() * x.shape[1] ** 0.5
