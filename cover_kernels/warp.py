"""warp: sample an image or a feature map at p + u(p), u being a flow of the same or of a coarser level."""

import torch
from torch import Tensor

from cover_kernels.checks import (
    acc_dtype,
    check_grad,
    check_image,
    check_like,
    coarse_shape,
    is_channels_last,
    order,
    per_axis,
    promoted,
)
from cover_kernels.operators import register


def warp(x: Tensor, flow: Tensor, stride: int | tuple[int, ...] = 1, padding: str = "zeros") -> Tensor:
    """Resample `x` along a displacement field: y(p) = x(p + u(p)), linear interpolation.

    u = Up(flow), the flow brought to the level of `x`: u(p) = stride * flow((p + 0.5) / stride - 0.5), linear
    interpolation, clamped at the border. It is never written to memory. A zero displacement is the identity,
    bit for bit. A voxel whose displacement is NaN becomes NaN.

    Args:
        x: [B, C, H, W] or [B, C, D, H, W]; float64, float32, bfloat16 or float16.
        flow: [B, d, *(S / stride)], in voxels of its own level; component i moves along spatial axis i. The dtype of
            `x` or float32 (float64 beside float64); under autocast any, and the wider of both is taken.
        stride: how many times coarser than `x` the flow is, an int or one per axis; must divide S.
        padding: what lies outside the image, "zeros" or "border" (the nearest voxel).

    Returns:
        y, shape, dtype and order of memory of `x`: channels last for channels last, else contiguous; so is its
        gradient. On CPUs, channels last takes less time and memory where 8 divides C.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. RuntimeError: second derivatives,
            forward-mode derivatives.
    """
    d = check_image("warp", "x", x)
    stride = per_axis("warp", "stride", stride, d)
    shape = (x.shape[0], d, *coarse_shape("warp", stride, "x", x))
    flow = promoted(flow, x)
    check_like("warp", "flow", flow, "x", x, shape, (x.dtype, acc_dtype(x.dtype)))
    if not isinstance(padding, str) or padding not in ("zeros", "border"):
        raise ValueError(f'warp: `padding` must be "zeros" or "border", got {padding!r}')
    # an argument, not found out by the operator: a compiler may give it another order than it was traced with
    return torch.ops.cover_kernels.warp_fwd(x, flow, stride, padding == "border", is_channels_last(x))


def _fwd_fake(x, flow, stride, border, channels_last):
    return torch.empty_like(x, memory_format=order(channels_last, x.dim()))


def _setup_context(ctx, inputs, output):
    x, flow, ctx.stride, ctx.border, ctx.channels_last = inputs
    ctx.save_for_backward(x, flow)


def _backward(ctx, grad_y):
    check_grad("warp", grad_y)
    x, flow = ctx.saved_tensors
    options = ctx.stride, ctx.border, torch.are_deterministic_algorithms_enabled(), ctx.channels_last
    grad_x, grad_flow = torch.ops.cover_kernels.warp_bwd(grad_y, x, flow, *options)
    return grad_x, grad_flow, None, None, None


def _bwd_fake(grad_y, x, flow, stride, border, deterministic, channels_last):
    return torch.empty_like(x, memory_format=order(channels_last, x.dim())), flow.new_empty(flow.shape)


register("warp_fwd", fake=_fwd_fake, setup_context=_setup_context, backward=_backward)
register("warp_bwd", fake=_bwd_fake)
