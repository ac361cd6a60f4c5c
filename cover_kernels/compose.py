"""compose: chain a coarse flow after a residual one, the step from level to level of the vector pyramid (VPA)."""

import torch
from torch import Tensor

from cover_kernels.checks import check_grad, check_image, check_like, coarse_shape, per_axis, promoted
from cover_kernels.operators import register


def compose(flow: Tensor, residual: Tensor, stride: int | tuple[int, ...] = 1) -> Tensor:
    """Displacement of first moving by `residual`, then by `flow`: y(p) = residual(p) + Up(flow)(p + residual(p)).

    Up(flow)(p) = stride * flow((p + 0.5) / stride - 0.5) is a function of any real position p: `flow` is read once,
    at the point where p + residual(p) lies on its own level, linear interpolation, clamped at the border.
    (COVER, "Vector Pyramid Aggregation".)

    Args:
        flow: [B, d, *(S / stride)], in voxels of its own level; same dtype as `residual`. Under autocast the wider of
            both dtypes is taken.
        residual: [B, d, *S] with S = (H, W) or (D, H, W), in voxels; float64, float32, bfloat16 or float16.
        stride: how many times coarser than `residual` the flow is, an int or one per axis; must divide S.

    Returns:
        y, shape and dtype of `residual`, in voxels.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. RuntimeError: second derivatives,
            forward-mode derivatives.
    """
    d = check_image("compose", "residual", residual, "d")
    flow, residual = promoted(flow, residual), promoted(residual, flow)
    if residual.shape[1] != d:
        raise ValueError(f"compose: `residual` must have {d} channels, one per axis, got {list(residual.shape)}")
    stride = per_axis("compose", "stride", stride, d)
    shape = (residual.shape[0], d, *coarse_shape("compose", stride, "residual", residual))
    check_like("compose", "flow", flow, "residual", residual, shape)
    return torch.ops.cover_kernels.compose_fwd(flow, residual, stride)


def _fwd_fake(flow, residual, stride):
    return residual.new_empty(residual.shape)


def _setup_context(ctx, inputs, output):
    flow, residual, ctx.stride = inputs
    ctx.save_for_backward(flow, residual)


def _backward(ctx, grad_y):
    check_grad("compose", grad_y)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = torch.ops.cover_kernels.compose_bwd(grad_y, *ctx.saved_tensors, ctx.stride, deterministic)
    return *grads, None


def _bwd_fake(grad_y, flow, residual, stride, deterministic):
    return flow.new_empty(flow.shape), residual.new_empty(residual.shape)


register("compose_fwd", fake=_fwd_fake, setup_context=_setup_context, backward=_backward)
register("compose_bwd", fake=_bwd_fake)
