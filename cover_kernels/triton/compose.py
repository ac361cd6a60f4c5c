"""compose in Triton: a program takes a block of voxels and reads the coarse flow once for each, where it leads.

The backward adds grad_flow up by a scatter (common.py); grad_residual is local.
"""

import torch
import triton
import triton.language as tl

from cover_kernels.triton.common import (
    Scatter,
    block_of_voxels,
    coarse_position,
    find_cell,
    find_corners,
    launch,
    load_scale,
    on_device,
    position_gradient,
    program,
    sample,
    scatter,
    volume,
    voxel_position,
)


@triton.jit
def _components(x, b, voxel, valid, P, d: tl.constexpr, ACC: tl.constexpr):
    """The components of x [B, d, P] along D (0 in 2D), H and W at voxels [BLOCK]."""
    x += b * d * P + voxel
    y_component = tl.load(x + (d - 2) * P, mask=valid, other=0).to(ACC)
    x_component = tl.load(x + (d - 1) * P, mask=valid, other=0).to(ACC)
    z_component = tl.load(x, mask=valid, other=0).to(ACC) if d == 3 else y_component * 0
    return z_component, y_component, x_component


@triton.jit
def _coarse_cell(residual, voxel, D, H, W, SZ, SY, SX, ACC: tl.constexpr):
    """The cells of the coarse flow around p + residual(p)."""
    z, y, x = voxel_position(voxel, H, W, ACC)
    z = coarse_position(z + residual[0], SZ)
    y = coarse_position(y + residual[1], SY)
    x = coarse_position(x + residual[2], SX)
    return find_cell(z, y, x, D // SZ, H // SY, W // SX, True)


@triton.jit
def _compose_fwd(
    flow,  # [B, d, P / stride]
    residual,  # [B, d, P]
    out,  # [B, d, P]
    programs,
    P,
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    b, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    w = _components(residual, b, voxel, valid, P, d, ACC)
    CD, CH, CW = D // SZ, H // SY, W // SX
    cell = _coarse_cell(w, voxel, D, H, W, SZ, SY, SX, ACC)
    indices, weights, _ = find_corners(cell, CD, CH, CW, d, INDEX)
    strides = (SZ, SY, SX)
    for a in tl.static_range(d):
        plane = flow + (b * d + a) * (tl.cast(CD, tl.int64) * CH * CW)
        y = w[a + 3 - d] + strides[a + 3 - d] * sample(plane, indices, weights, valid)
        tl.store(out + (b * d + a) * P + voxel, y, mask=valid)


@triton.jit
def _compose_bwd(
    grad_y,  # [B, d, P]
    flow,  # [B, d, P / stride]
    residual,  # [B, d, P]
    grad_residual,  # [B, d, P]
    sums,  # this and the next: see common.Scatter
    words,
    out,  # grad_flow [B, d, P / stride]
    exponents,  # [B, d]
    spare,
    programs,
    P,
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    ACC: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    b, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    w = _components(residual, b, voxel, valid, P, d, ACC)
    grad = _components(grad_y, b, voxel, valid, P, d, ACC)
    CD, CH, CW = D // SZ, H // SY, W // SX
    cell = _coarse_cell(w, voxel, D, H, W, SZ, SY, SX, ACC)
    indices, weights, counted = find_corners(cell, CD, CH, CW, d, INDEX)
    strides = (SZ, SY, SX)
    products = ()
    for k in tl.static_range(2**d):
        product = tl.zeros((BLOCK,), ACC)
        for a in tl.static_range(d):
            plane = (b * d + a) * (tl.cast(CD, tl.int64) * CH * CW)
            counts = valid & counted[k]
            # displacements were multiplied by the stride of their axis
            scaled = strides[a + 3 - d] * grad[a + 3 - d]
            product += scaled * tl.load(flow + plane + indices[k], mask=counts, other=0).to(ACC)
            scale = load_scale(exponents, b * d + a, spare) if WORDS else 0
            scatter(sums + plane, words, out + plane, indices[k], weights[k] * scaled, counts, scale, spare, WORDS)
        products = products + (product,)
    along = position_gradient(cell, products, counted, d)
    for a in tl.static_range(d):
        moved = grad[a + 3 - d] + along[a + 3 - d] / tl.cast(strides[a + 3 - d], ACC)
        tl.store(grad_residual + (b * d + a) * P + voxel, moved, mask=valid)


def _options(residual, stride):
    D, H, W = volume(residual)
    SZ, SY, SX = (1,) * (5 - residual.dim()) + tuple(stride)
    acc = tl.float64 if residual.dtype == torch.float64 else tl.float32
    return {"D": D, "H": H, "W": W, "SZ": SZ, "SY": SY, "SX": SX, "d": residual.dim() - 2, "ACC": acc}


def compose_fwd(flow, residual, stride):
    """See `reference.compose_fwd`. Allocates its output only."""
    flow, residual = flow.contiguous(), residual.contiguous()
    y = torch.empty_like(residual)
    if len(residual):
        with on_device(residual):
            launch(_compose_fwd, residual, len(residual), flow, residual, y, **_options(residual, stride))
    return y


def compose_bwd(grad_y, flow, residual, stride, deterministic):
    """See `reference.compose_bwd`. Allocates its outputs and the sums of `common.Scatter`."""
    grad_y, flow, residual = grad_y.contiguous(), flow.contiguous(), residual.contiguous()
    grad_residual = torch.empty_like(residual)
    if not len(residual):
        return torch.empty_like(flow), grad_residual
    with on_device(residual):
        # a number that is added is a gradient times a weight and a stride
        sums = Scatter(flow, grad_y, residual[0, 0].numel() * max(stride), deterministic)
        arguments = (grad_y, flow, residual, grad_residual)
        launch(_compose_bwd, residual, len(residual), *arguments, **sums.arguments(), **_options(residual, stride))
        return sums.finish(), grad_residual
