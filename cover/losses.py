"""L_vec, L_con and the figures that are watched beside them: endpoint error, and the spread of the features.

Shapes: B batch, C channels, d spatial dimensions, S spatial shape; flows [B, d, *S] in voxels, mask bool [B, 1, *S]
(epsilon: the voxels whose match lies inside view a). Shapes that do not fit raise ValueError.
(COVER, "Self-Vector Regression".)
"""

import torch
from torch import Tensor

from cover.unet import CHANNELS_LAST
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product over the channels, [B, 1, *S]."""
    if a.device.type == "cpu" and a.dim() > 2 and a.stride() == b.stride() and a.stride(1) == 1:
        # channels last: no product of the size of `a` in fresh memory, which takes six times as long
        rows, others = (x.movedim(1, -1).reshape(-1, 1, x.shape[1]) for x in (a, b))
        with torch.autocast("cpu", enabled=False):
            return torch.bmm(rows, others.mT).view(len(a), 1, *a.shape[2:])
    return (a * b).sum(1, keepdim=True)


class _Cosine(torch.autograd.Function):
    """Cosine similarity over the channels of a, b [B, C, *S]: [B, 1, *S]. Nothing but a and b is kept of their size."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        inverse_a, inverse_b = ((_dot(x, x) + _EPS).rsqrt() for x in (a, b))
        cosine = _dot(a, b) * inverse_a * inverse_b
        ctx.save_for_backward(a, b, cosine, inverse_a, inverse_b)
        return cosine

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, cosine, inverse_a, inverse_b = ctx.saved_tensors
        across, along = grad * inverse_a * inverse_b, grad * cosine
        pairs = ((a, b, inverse_a), (b, a, inverse_b))
        return tuple(
            (other * across).addcmul_(own, along * inverse.square(), value=-1) if needed else None
            for (own, other, inverse), needed in zip(pairs, ctx.needs_input_grad, strict=True)
        )


def consistency_loss(features_b: Tensor, features_a: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """L_con: 1 - mean cosine similarity between F_b and warp(F_a, psi) over the mask; a scalar.

    Args:
        features_b, features_a: [B, C, *S], the finest level of both views, one dtype.
        flow: the true psi, float32 [B, d, *S].
        mask: bool [B, 1, *S]. An empty one gives 0 and zero gradients.
    """
    _check("consistency_loss", ("features_b", "features_a"), features_b, features_a, mask)
    wide = torch.promote_types(features_b.dtype, torch.float32)
    b, matched = features_b.to(wide), warp(features_a, flow, padding="border").to(wide)
    if b.stride(1) == 1:  # one order of memory for both, in the gradients too
        matched = matched.contiguous(memory_format=CHANNELS_LAST[flow.shape[1]])
    return _masked_mean((1 - _Cosine.apply(b, matched)).masked_fill(~mask, 0), mask)


def epe(predicted: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """Endpoint error |predicted - flow| in voxels, of each voxel of the mask: [mask.sum()], in order of the batch."""
    _check("epe", ("predicted", "flow"), predicted, flow, mask)
    return torch.linalg.vector_norm(predicted - flow, dim=1, keepdim=True)[mask]


@torch.no_grad()
def mean_epe(predicted: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """The mean of `epe`, a scalar without a gradient, 0 for an empty mask; unlike the errors themselves its shape is
    known beforehand."""
    _check("mean_epe", ("predicted", "flow"), predicted, flow, mask)
    # linalg.vector_norm takes a hundred times as long over the channels of a CPU's tensor (torch 2.13)
    errors = (predicted - flow).square_().sum(1, keepdim=True).sqrt_()
    return _masked_mean(errors.masked_fill_(~mask, 0), mask)


@torch.no_grad()
def feature_variance(features: Tensor) -> Tensor:
    """How far the features [B, C, *S] are from collapse: 0 when all voxels share one direction, 1 when all differ.

    Mean over the channels of the standard deviation, over batch and voxels, of the unit-length features, times
    sqrt(C): 1 for directions spread evenly over the sphere. A scalar, float32.
    """
    x, voxels = features.float(), [0, *range(2, features.dim())]
    x = x * (_dot(x, x) + _EPS).rsqrt()
    x -= x.mean(voxels, keepdim=True)
    return x.square_().mean(voxels).sqrt_().mean() * x.shape[1] ** 0.5
