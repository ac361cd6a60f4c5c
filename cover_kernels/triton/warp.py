"""warp in Triton: a program takes a block of voxels, finds each one's cell once and reads all channels through it.

A coarser flow is interpolated in the kernel. The backward adds grad_x up by a scatter (common.py) and finds, in the
same pass, the gradient of the displacement at each voxel; with a stride, that is gathered into grad_flow by a second
kernel, always in the same order.
"""

import torch
import triton
import triton.language as tl

from cover_kernels.checks import acc_dtype, order
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
def _displaced(
    flow,
    b,
    voxel,
    valid,
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Positions p + u(p) of voxels [BLOCK] along D (0 in 2D), H and W; u = Up(flow), flow [B, d, *(S / stride)]."""
    z, y, x = voxel_position(voxel, H, W, ACC)
    CD, CH, CW = D // SZ, H // SY, W // SX
    plane = tl.cast(CD, tl.int64) * CH * CW
    flow += b * d * plane
    if UP:
        coarse = find_cell(coarse_position(z, SZ), coarse_position(y, SY), coarse_position(x, SX), CD, CH, CW, True)
        indices, weights, _ = find_corners(coarse, CD, CH, CW, d, INDEX)
        if d == 3:
            z += SZ * sample(flow, indices, weights, valid)
        y += SY * sample(flow + (d - 2) * plane, indices, weights, valid)
        x += SX * sample(flow + (d - 1) * plane, indices, weights, valid)
    else:
        flow += voxel
        if d == 3:
            z += tl.load(flow, mask=valid, other=0).to(ACC)
        y += tl.load(flow + (d - 2) * plane, mask=valid, other=0).to(ACC)
        x += tl.load(flow + (d - 1) * plane, mask=valid, other=0).to(ACC)
    return z, y, x


@triton.jit
def _warp_fwd(
    x,  # [B, C, P]
    flow,  # [B, d, P / stride]
    y,  # [B, C, P]
    programs,
    P,
    C,
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    UP: tl.constexpr,  # some stride is not 1
    BORDER: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    b, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    at_z, at_y, at_x = _displaced(flow, b, voxel, valid, D, H, W, SZ, SY, SX, d, UP, ACC, INDEX)
    indices, weights, _ = find_corners(find_cell(at_z, at_y, at_x, D, H, W, BORDER), D, H, W, d, INDEX)
    for c in range(C):
        channel = (b * C + c) * P
        tl.store(y + channel + voxel, sample(x + channel, indices, weights, valid), mask=valid)


@triton.jit
def _warp_bwd(
    grad_y,  # [B, C, P]
    x,  # [B, C, P]
    flow,  # [B, d, P / stride]
    grad_u,  # [B, d, P]
    sums,  # this and the next: see common.Scatter
    words,
    out,  # grad_x [B, C, P]
    exponents,  # [B, C]
    spare,
    programs,
    P,
    C,
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    UP: tl.constexpr,
    BORDER: tl.constexpr,
    ACC: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    b, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    at_z, at_y, at_x = _displaced(flow, b, voxel, valid, D, H, W, SZ, SY, SX, d, UP, ACC, INDEX)
    cell = find_cell(at_z, at_y, at_x, D, H, W, BORDER)
    indices, weights, counted = find_corners(cell, D, H, W, d, INDEX)
    products = ()
    for _ in tl.static_range(2**d):
        products = products + (tl.zeros((BLOCK,), ACC),)
    for c in range(C):
        channel = (b * C + c) * P
        grad = tl.load(grad_y + channel + voxel, mask=valid, other=0).to(ACC)
        scale = load_scale(exponents, b * C + c, spare) if WORDS else 0
        added = ()
        for k in tl.static_range(2**d):
            counts = valid & counted[k]
            value = tl.load(x + channel + indices[k], mask=counts, other=0).to(ACC)
            added = added + (products[k] + grad * value,)
            scatter(sums + channel, words, out + channel, indices[k], weights[k] * grad, counts, scale, spare, WORDS)
        products = added
    along_z, along_y, along_x = position_gradient(cell, products, counted, d)
    grad_u += b * d * P + voxel
    if d == 3:
        tl.store(grad_u, along_z, mask=valid)
    tl.store(grad_u + (d - 2) * P, along_y, mask=valid)
    tl.store(grad_u + (d - 1) * P, along_x, mask=valid)


@triton.jit
def _coarse_weight(fine, coarse, stride, size, ACC: tl.constexpr):
    """What fine voxels take from the coarse voxel `coarse` of `size` along one axis, when they are interpolated."""
    position = coarse_position(fine.to(ACC), stride)
    position = tl.minimum(tl.maximum(position, 0), tl.cast(size - 1, ACC))
    return tl.maximum(1 - tl.abs(position - coarse.to(ACC)), 0)


@triton.jit
def _upsample_bwd(
    grad_u,  # [B, d, P]
    grad_flow,  # [B, d, P / stride]
    programs,
    P,  # voxels of the coarse volume
    D,
    H,
    W,
    SZ,
    SY,
    SX,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    ACC: tl.constexpr = grad_u.dtype.element_ty
    i, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    CD, CH, CW = D // SZ, H // SY, W // SX
    z, y, x = voxel // CW // CH, voxel // CW % CH, voxel % CW
    total = tl.zeros((BLOCK,), ACC)
    # the fine voxels within one coarse voxel of this one, along each axis: 2 stride of them, one less of an odd stride
    for t_z in range(2 * SZ - SZ % 2):
        fine_z = z * SZ - SZ // 2 + t_z
        weight_z = _coarse_weight(fine_z, z, SZ, CD, ACC)
        for t_y in range(2 * SY - SY % 2):
            fine_y = y * SY - SY // 2 + t_y
            weight_y = weight_z * _coarse_weight(fine_y, y, SY, CH, ACC)
            inside_y = valid & (fine_z >= 0) & (fine_z < D) & (fine_y >= 0) & (fine_y < H)
            row = grad_u + i * D * H * W + (fine_z.to(tl.int64) * H + fine_y) * W
            for t_x in range(2 * SX - SX % 2):
                fine_x = x * SX - SX // 2 + t_x
                weight = weight_y * _coarse_weight(fine_x, x, SX, CW, ACC)
                inside = inside_y & (fine_x >= 0) & (fine_x < W)
                total += weight * tl.load(row + fine_x, mask=inside, other=0)
    # displacements are scaled to voxels of the fine level
    axis = 3 - d + i % d
    stride = tl.where(axis == 0, SZ, tl.where(axis == 1, SY, SX))
    tl.store(grad_flow + i * P + voxel, total * tl.cast(stride, ACC), mask=valid)


def _sizes(x, stride):
    D, H, W = volume(x)
    SZ, SY, SX = (1,) * (5 - x.dim()) + tuple(stride)
    return {"D": D, "H": H, "W": W, "SZ": SZ, "SY": SY, "SX": SX, "d": x.dim() - 2}


def _options(x, stride, border):
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {**_sizes(x, stride), "C": x.shape[1], "UP": any(s != 1 for s in stride), "BORDER": border, "ACC": acc}


def warp_fwd(x, flow, stride, border, channels_last):
    """See `reference.warp_fwd`. Allocates its output only."""
    x, flow = x.contiguous(), flow.contiguous()
    y = torch.empty_like(x)
    if len(x):
        with on_device(x):
            launch(_warp_fwd, x, len(x), x, flow, y, **_options(x, stride, border))
    return y.contiguous(memory_format=order(channels_last, x.dim()))


def warp_bwd(grad_y, x, flow, stride, border, deterministic, channels_last):
    """See `reference.warp_bwd`. Allocates its outputs, the sums of `common.Scatter` and, with a stride, the gradient of
    the displacement at every voxel: [B, d, *S] acc."""
    grad_y, x, flow = grad_y.contiguous(), x.contiguous(), flow.contiguous()
    if not len(x):
        return torch.empty_like(x), torch.empty_like(flow)
    options = _options(x, stride, border)
    with on_device(x):
        sums = Scatter(x, grad_y, x[0, 0].numel(), deterministic)
        grad_flow = torch.empty_like(flow)
        grad_u = (
            x.new_empty((len(x), *flow.shape[1:2], *x.shape[2:]), dtype=acc_dtype(x.dtype))
            if options["UP"]
            else grad_flow
        )
        launch(_warp_bwd, x, len(x), grad_y, x, flow, grad_u, **sums.arguments(), **options)
        if options["UP"]:
            launch(_upsample_bwd, flow, flow.shape[0] * flow.shape[1], grad_u, grad_flow, **_sizes(x, stride))
        return sums.finish().contiguous(memory_format=order(channels_last, x.dim())), grad_flow
