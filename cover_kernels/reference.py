"""The specification: every operator in plain torch, without tricks, on any device, also in float64.

Shapes are those of `schemas.py`. Sums over a window or over the corners of a cell are loops, so that each line
can be read against the formulas in docs/derivations.md. It is also what runs where nothing was compiled. Argument
`deterministic` is for compiled backends: torch's own operators obey the global setting that it is taken from.
"""

from itertools import product

import torch
import torch.nn.functional as F

from cover_kernels.checks import acc_dtype, order


def _offsets(window):
    """All offsets o of a window, in array order, as tuples of ints."""
    return list(product(*(range(-(n // 2), n // 2 + 1) for n in window)))


def _within_reach(window, S):
    """The window, no wider than what a voxel at the border of the image sees: all beyond is outside it."""
    return [min(n, 2 * size - 1) for n, size in zip(window, S, strict=True)]


def _pad(x, window):
    """x with r = (N - 1) / 2 zeros on both ends of every spatial axis."""
    return F.pad(x, [n // 2 for n in reversed(window) for _ in (0, 1)])


def _at(padded, o, window, S):
    """View of `padded` [..., *(S + 2r)] that reads position p + o at p, [..., *S]."""
    for axis, (offset, n, size) in enumerate(zip(o, window, S, strict=True), start=-len(S)):
        padded = padded.narrow(axis, offset + n // 2, size)
    return padded


def _veu_weights(q, k, window, heads, scale, mask):
    """Operands in accumulation type, split into groups, and the scores of each offset ([B, J, *S], -inf: no key)."""
    B, _, *S = q.shape
    acc = acc_dtype(q.dtype)
    if mask is not None:
        k = k.masked_fill(~mask, 0)  # whatever a key holds that takes no part, a NaN too
    q = q.to(acc).unflatten(1, (heads, -1))
    keys = _pad(k.to(acc), window).unflatten(1, (heads, -1))
    valid = _pad(torch.ones((B, 1, *S), dtype=torch.bool, device=q.device) if mask is None else mask, window)
    scores = [
        ((q * _at(keys, o, window, S)).sum(2) * scale).masked_fill(~_at(valid, o, window, S), -torch.inf)
        for o in _offsets(window)
    ]
    return q, keys, scores


def veu_fwd(q, k, window, heads, scale, mask):
    window = _within_reach(window, q.shape[2:])
    *_, scores = _veu_weights(q, k, window, heads, scale, mask)
    scores = torch.stack(scores)
    lse = scores.logsumexp(0)
    w = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp().mean(2)
    template = torch.tensor(_offsets(window), dtype=w.dtype, device=w.device)
    return torch.einsum("ob...,od->bd...", w, template).contiguous(), lse


def veu_bwd(grad_v, q, k, v, lse, window, heads, scale, mask):
    S = q.shape[2:]
    window = _within_reach(window, S)
    groups, keys, scores = _veu_weights(q, k, window, heads, scale, mask)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    # <g, o> for each offset, and delta_j = <g, v_j>
    moments = [sum(g * c for g, c in zip(grad_v.unbind(1), o, strict=True)).unsqueeze(1) for o in _offsets(window)]
    delta = sum((s - lse).exp() * m for s, m in zip(scores, moments, strict=True))
    grad_q, grad_keys = torch.zeros_like(groups), torch.zeros_like(keys)
    for o, s, m in zip(_offsets(window), scores, moments, strict=True):
        ds = ((s - lse).exp() * (m - delta) * (scale / heads)).unsqueeze(2)
        grad_q += ds * _at(keys, o, window, S)
        _at(grad_keys, o, window, S).add_(ds * groups)
    grad_k = _at(grad_keys, [0] * len(S), window, S)
    if mask is not None:
        grad_k = grad_k.masked_fill(~mask.unsqueeze(2), 0)
    return grad_q.flatten(1, 2).to(q.dtype), grad_k.flatten(1, 2).to(k.dtype).contiguous()


def _identity(S, like):
    """The position of every voxel, [1, d, *S]."""
    axes = [torch.arange(size, dtype=like.dtype, device=like.device) for size in S]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)


def _corners(position, S, border):
    """The 2^d corners of the cell around `position` [B, d, *P] in an image of shape S.

    Yields (index [B, P] into the flattened image, weight [B, P], slope [B, d, P]), slope being the weight's
    derivative with respect to the position. Corners outside the image have weight and slope 0; with `border` the
    position is clamped into the image first. A NaN position gives NaN weights.
    """
    position = position.flatten(2)
    size = torch.tensor(S, device=position.device).view(1, -1, 1)
    low, high = (0, size - 1) if border else (-1, size)
    clamped = position.clamp(torch.as_tensor(low, device=size.device), high)
    # a clamped position does not move; at the far border itself, clamping begins
    moves = (position == clamped) & (position < high) if border else position == clamped
    base = clamped.nan_to_num(0).floor()
    fraction = clamped - base
    for corner in product((0, 1), repeat=len(S)):
        bits = torch.tensor(corner, device=size.device).view(1, -1, 1)
        index = base.long() + bits
        factor = torch.where(bits == 1, fraction, 1 - fraction)
        inside = ((index >= 0) & (index < size)).all(1) | position.isnan().any(1)
        weight = factor.prod(1).masked_fill(~inside, 0)
        slope = torch.stack(
            [
                (2 * corner[i] - 1) * factor[:, [j for j in range(len(S)) if j != i]].prod(1) * moves[:, i]
                for i in range(len(S))
            ],
            dim=1,
        ).masked_fill(~inside.unsqueeze(1), 0)
        flat = torch.zeros_like(index[:, 0])
        for i, n in enumerate(S):
            flat = flat * n + index[:, i].clamp(0, n - 1)
        yield flat, weight, slope


def _gather(x, flat):
    """x [B, C, *S] at the flattened positions [B, P]: [B, C, P]."""
    return x.flatten(2).gather(2, flat.unsqueeze(1).expand(-1, x.shape[1], -1))


def _sample(x, position, border):
    """x [B, C, *S] at `position` [B, d, *P], linear interpolation: [B, C, *P]."""
    y = -0.0
    for flat, weight, _ in _corners(position, x.shape[2:], border):
        weight = weight.unsqueeze(1)
        # a corner of weight 0 contributes nothing, whatever its value, and -0.0 is what changes no sum:
        # the identity holds to the bit beside infinities and for negative zeros too
        y = y + torch.where(weight == 0, -0.0, weight * _gather(x, flat))
    return y.unflatten(2, position.shape[2:])


def _sample_bwd(grad_y, x, position, border):
    """Gradients of `_sample` with respect to x [B, C, *S] and position [B, d, *P]."""
    grad_y = grad_y.flatten(2)
    grad_x = torch.zeros_like(x).flatten(2)
    grad_position = 0
    for flat, weight, slope in _corners(position, x.shape[2:], border):
        grad_x.scatter_add_(2, flat.unsqueeze(1).expand_as(grad_y), grad_y * weight.unsqueeze(1))
        grad_position = grad_position + slope * (grad_y * _gather(x, flat)).sum(1, keepdim=True)
    return grad_x.view_as(x), grad_position.unflatten(2, position.shape[2:])


def _coarse_position(position, stride):
    """Where a position [B, d, *P] of one level lies on the level that is coarser by `stride`."""
    return (position + 0.5) / _stride(stride, position) - 0.5


def _stride(stride, like):
    return torch.tensor(stride, dtype=like.dtype, device=like.device).view(1, -1, *[1] * (like.dim() - 2))


def _upsample(flow, S, stride):
    """Up(flow) on the finer level of shape S, in voxels of that level: [B, d, *S]."""
    if all(s == 1 for s in stride):
        return flow
    position = _coarse_position(_identity(S, flow), stride).expand(flow.shape[0], -1, *S)
    return _stride(stride, flow) * _sample(flow, position, border=True)


def _upsample_bwd(grad_u, flow, stride):
    if all(s == 1 for s in stride):
        return grad_u
    position = _coarse_position(_identity(grad_u.shape[2:], flow), stride).expand_as(grad_u)
    return _sample_bwd(_stride(stride, flow) * grad_u, flow, position, border=True)[0]


def _warp_operands(x, flow, stride):
    acc = acc_dtype(x.dtype)
    x, flow = x.to(acc), flow.to(acc)
    S = x.shape[2:]
    return x, flow, _identity(S, flow) + _upsample(flow, S, stride)


def warp_fwd(x, flow, stride, border, channels_last):
    image, _, position = _warp_operands(x, flow, stride)
    return _sample(image, position, border).to(x.dtype).contiguous(memory_format=order(channels_last, x.dim()))


def warp_bwd(grad_y, x, flow, stride, border, deterministic, channels_last):
    image, field, position = _warp_operands(x, flow, stride)
    grad_x, grad_u = _sample_bwd(grad_y.to(image.dtype), image, position, border)
    grad_x = grad_x.to(x.dtype).contiguous(memory_format=order(channels_last, x.dim()))
    return grad_x, _upsample_bwd(grad_u, field, stride).to(flow.dtype, copy=True)


def _compose_operands(flow, residual, stride):
    acc = acc_dtype(residual.dtype)
    flow, residual = flow.to(acc), residual.to(acc)
    position = _coarse_position(_identity(residual.shape[2:], residual) + residual, stride)
    return flow, residual, position


def compose_fwd(flow, residual, stride):
    field, w, position = _compose_operands(flow, residual, stride)
    return (w + _stride(stride, w) * _sample(field, position, border=True)).to(residual.dtype)


def compose_bwd(grad_y, flow, residual, stride, deterministic):
    field, w, position = _compose_operands(flow, residual, stride)
    grad_y = grad_y.to(w.dtype)
    s = _stride(stride, w)
    grad_flow, grad_position = _sample_bwd(s * grad_y, field, position, border=True)
    return grad_flow.to(flow.dtype), (grad_y + grad_position / s).to(residual.dtype)
