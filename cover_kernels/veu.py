"""VEU, the Vector Embedding Unit: windowed attention whose values are the offsets of the window themselves."""

from operator import index

import torch
from torch import Tensor

from cover_kernels.checks import acc_dtype, check_grad, check_image, check_like, is_count, is_finite, per_axis, promoted
from cover_kernels.operators import register


def veu(
    q: Tensor,
    k: Tensor,
    window: int | tuple[int, ...],
    heads: int = 1,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Expected displacement of every voxel under a softmax over its window, averaged over groups.

    For a voxel p, a group j and an offset o in the window, with o running over the keys p + o that lie inside the
    image and are not masked out:

        w_j(p, .) = softmax_o(scale * <q_j(p), k_j(p + o)>),   v(p) = mean_j sum_o w_j(p, o) * o

    A voxel without any valid key gets v = 0. (COVER, "Mixture of Vectors": VEU followed by MVI.)

    Args:
        q: queries, [B, J*C, H, W] or [B, J*C, D, H, W]; float64, float32, bfloat16 or float16. Channel j*C + c
            belongs to group j.
        k: keys, same shape, dtype and device as `q`. Under autocast the wider of both dtypes is taken.
        window: odd window width N in voxels, or one per axis in array order; may be wider than the image.
        heads: J, the number of vector groups.
        scale: 1 / tau, a number; default C ** -0.5. For a temperature that is learned, multiply `q` by it.
        mask: bool [B, 1, *S], True where a key takes part.

    Returns:
        v, [B, d, *S], in voxels; component i moves along spatial axis i. float64 for float64 inputs, else float32:
        half precision would round a displacement of 60 voxels to a quarter of a voxel.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. RuntimeError: second derivatives,
            forward-mode derivatives.
    """
    d = check_image("veu", "q", q, "J*C")
    q, k = promoted(q, k), promoted(k, q)
    check_like("veu", "k", k, "q", q, q.shape)
    window = per_axis("veu", "window", window, d)
    if any(n % 2 == 0 for n in window):
        raise ValueError(f"veu: `window` must be odd on every axis, got {window}")
    if not is_count(heads) or q.shape[1] % index(heads):
        raise ValueError(f"veu: `heads` must be a positive int that divides the {q.shape[1]} channels, got {heads!r}")
    heads = index(heads)
    if scale is None:
        scale = (q.shape[1] // heads) ** -0.5
    elif not is_finite(scale, acc_dtype(q.dtype)):
        raise TypeError(
            f"veu: `scale` must be an int or float that is finite in {acc_dtype(q.dtype)}, got {scale!r}; "
            "to learn it, multiply `q` by it and give scale=1"
        )
    if mask is not None:
        check_like("veu", "mask", mask, "q", q, (q.shape[0], 1, *q.shape[2:]), (torch.bool,))
    return torch.ops.cover_kernels.veu_fwd(q, k, window, heads, float(scale), mask)[0]


def _fwd_fake(q, k, window, heads, scale, mask):
    B, _, *S = q.shape
    acc = acc_dtype(q.dtype)
    return q.new_empty((B, len(S), *S), dtype=acc), q.new_empty((B, heads, *S), dtype=acc)


def _setup_context(ctx, inputs, output):
    q, k, ctx.window, ctx.heads, ctx.scale, mask = inputs
    v, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else autograd would allocate a gradient of zeros for lse
    ctx.save_for_backward(q, k, v, lse, mask)


def _backward(ctx, grad_v, _grad_lse):
    if grad_v is None:
        return (None,) * 6
    check_grad("veu", grad_v)
    q, k, v, lse, mask = ctx.saved_tensors
    grads = torch.ops.cover_kernels.veu_bwd(grad_v, q, k, v, lse, ctx.window, ctx.heads, ctx.scale, mask)
    return *grads, None, None, None, None


def _bwd_fake(grad_v, q, k, v, lse, window, heads, scale, mask):
    return q.new_empty(q.shape), k.new_empty(k.shape)


register("veu_fwd", fake=_fwd_fake, setup_context=_setup_context, backward=_backward)
register("veu_bwd", fake=_bwd_fake)
