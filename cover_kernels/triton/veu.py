"""VEU in Triton: a program keeps a tile of voxels in registers and reads the rows of its window from cache.

A tile is ROWS x COLS voxels of one slice z. For each row that some voxel of the tile sees, the scores of up to
OFFSETS neighbouring offsets along W are in registers at once, and a voxel that is loaded serves all ROWS. The softmax
is online in base 2, with scale * log2(e) folded into the queries; only the sum and the moment along W are added up
per key, the moments along H and D once per row. The backward (docs/derivations.md) is two gathers, so that its result
is the same bits in every run. Nothing of size N^d exists anywhere.

A thread holds a chunk of up to 32 channels of its voxels, most often all of a group, so that a dot product needs no
exchange between threads. The other chunks of a larger group are read from cache for every score, and in the backward a
program has one chunk of the gradient. A chunk is BLOCKS blocks of VEC channels, the first axis of every block.
"""

import torch
import triton
import triton.language as tl

from cover_kernels.checks import acc_dtype
from cover_kernels.triton.common import LN2, LOG2E, grid, lanes, on_device, program, volume

MOST_BLOCKS = 8  # of a chunk: what is unrolled
MOST_CHANNELS, MOST_SHARED = 32, 12  # of the only chunk of a group, of one of several
MOST_OFFSETS = 9  # scores of a row that are in registers at once; wider windows take several turns
# What fits into the registers of a thread without spilling (tests/test_triton.py), in numbers of the channels' type:
# of its own voxels, and in the backward of the voxels of the window that are being loaded.
OWN_NUMBERS, LOADED_NUMBERS = 64, 32

# Loads are of one voxel per thread whatever the alignment: a thread that held four neighbours for the sake of one wide
# load of its queries would read the keys, which lie at odd addresses, in strides of four.
_jit = triton.jit(do_not_specialize_on_alignment=["P", "H", "W"])


@triton.jit
def _tile(index, D, H, W, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tile `index` of a stack of volumes: the volume (int64), z, y of the first row, y [ROWS, 1] and x [1, COLS]."""
    ny, nx = tl.cdiv(H, ROWS), tl.cdiv(W, COLS)
    y0 = (index // nx % ny).to(tl.int32) * ROWS
    y, x = y0 + tl.arange(0, ROWS)[:, None], (index % nx).to(tl.int32) * COLS + tl.arange(0, COLS)[None, :]
    return index // nx // ny // D, (index // nx // ny % D).to(tl.int32), y0, y, x


@triton.jit
def _row(z, y, H, W):
    """Where row (z, y) begins in a volume, int64."""
    return (tl.cast(z, tl.int64) * H + y) * W


@triton.jit
def _load(x, at, valid, P, chunk, C: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr):
    """A chunk of x [C, P] at voxels `at` [rows, COLS], 0 where not `valid`: BLOCKS blocks [VEC, rows, COLS]."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        c = (chunk * BLOCKS + i) * VEC + tl.arange(0, VEC)[:, None, None]
        block = tl.load(x + (c.to(tl.int64) * P + at[None]), mask=(c < C) & valid[None], other=0)
        blocks = blocks + (block.to(ACC),)
    return blocks


@triton.jit
def _store(x, at, valid, blocks, P, chunk, C: tl.constexpr):
    """The reverse of `_load`."""
    VEC: tl.constexpr = blocks[0].shape[0]
    for i in tl.static_range(len(blocks)):
        c = (chunk * len(blocks) + i) * VEC + tl.arange(0, VEC)[:, None, None]
        tl.store(x + (c.to(tl.int64) * P + at[None]), blocks[i], mask=(c < C) & valid[None])


@triton.jit
def _dot(a, b):
    """Sum over the channels of a chunk of a * b: [ROWS, COLS]."""
    total = a[0] * b[0]
    for i in tl.static_range(1, len(a)):
        total += a[i] * b[i]
    return tl.sum(total, 0)


@triton.jit
def _product(a, b, x, at_x, valid_x, y, at_y, valid_y, P, chunk, factor, C: tl.constexpr):
    """<factor * x, y> over all channels of x and y [C, P], at voxels at_x and at_y: [ROWS, COLS].

    Of one chunk, a = factor * x and b = y are at hand; the others are read.
    """
    BLOCKS: tl.constexpr = len(a)
    VEC: tl.constexpr = a[0].shape[0]
    ACC: tl.constexpr = a[0].dtype
    total = _dot(a, b)
    if C > BLOCKS * VEC:
        others = tl.zeros_like(total)
        # block by block: more of them at once would spill
        for i in range((tl.cdiv(C, BLOCKS * VEC) - 1) * BLOCKS):
            block = tl.where(i < chunk * BLOCKS, i, i + BLOCKS)
            others += _dot(
                _load(x, at_x, valid_x, P, block, C, 1, VEC, ACC), _load(y, at_y, valid_y, P, block, C, 1, VEC, ACC)
            )
        total += factor * others
    return total


@triton.jit
def _scaled(a, factor):
    """a * factor, `factor` [ROWS, COLS] or [1, 1]."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] * factor[None],)
    return blocks


@triton.jit
def _added(total, w, a):
    """total + w * a, w [ROWS, COLS]."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (total[i] + w[None] * a[i],)
    return blocks


@triton.jit
def _taking_part(mask, at, x, W, o, RX: tl.constexpr):
    """Which keys [1, COLS] at x + o, `at` in the volume, take part: in the image, the window and the mask."""
    valid = (x + o >= 0) & (x + o < W) & (o <= RX)
    if mask is not None:
        valid = valid & tl.load(mask + at, mask=valid, other=0)
    return valid


@_jit
def _veu_fwd(
    q,  # [B, J*C, P]
    k,  # [B, J*C, P]
    mask,  # [B, P] or None
    v,  # [B, d, P] acc
    lse,  # [B, J, P] acc
    scale: tl.float64,
    programs,
    P,
    J,
    D,
    H,
    W,
    RZ,
    RY,
    RX: tl.constexpr,
    d: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    VEC: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    ACC: tl.constexpr = v.dtype.element_ty
    factor = tl.full((1, 1), scale, ACC) * LOG2E
    chunk: tl.constexpr = 0
    b, z, y0, y, x = _tile(index, D, H, W, ROWS, COLS)
    here = (y < H) & (x < W)
    at = _row(z, y, H, W) + x
    if mask is not None:
        mask += b * P
    zeros = tl.zeros((ROWS, COLS), ACC)
    v_z, v_y, v_x = zeros, zeros, zeros
    for j in range(J):
        group = (b * J + j) * C * P
        query = _scaled(_load(q + group, at, here, P, chunk, C, BLOCKS, VEC, ACC), factor)
        # the first maximum is half the least number: finite, so that -inf - top is never NaN
        top = zeros - (8e307 if v.dtype.element_ty == tl.float64 else 1.7e38)
        total, m_z, m_y, m_x = zeros, zeros, zeros, zeros
        for key_z in range(tl.maximum(z - RZ, 0), tl.minimum(z + RZ + 1, D)):
            for key_y in range(tl.maximum(y0 - RY, 0), tl.minimum(y0 + ROWS + RY, H)):
                near = tl.abs(key_y - y) <= RY
                for first in range(-RX, RX + 1, OFFSETS):
                    at_key = _row(key_z, key_y, H, W) + first + x.to(tl.int64)
                    before, scores = top, ()
                    for i in tl.static_range(OFFSETS):
                        valid = _taking_part(mask, at_key + i, x, W, first + i, RX)
                        key = _load(k + group + i, at_key, valid, P, chunk, C, BLOCKS, VEC, ACC)
                        score = _product(
                            query, key, q + group, at, here, k + group + i, at_key, valid, P, chunk, factor, C
                        )
                        score = tl.where(near & valid, score, float("-inf"))
                        top = tl.maximum(top, score)
                        scores = scores + (score,)
                    row_total, row_moment = zeros, zeros
                    for i in tl.static_range(OFFSETS):
                        w = tl.exp2(scores[i] - top)
                        row_total += w
                        row_moment += w * (first + i)
                    decay = tl.exp2(before - top)
                    total = total * decay + row_total
                    m_x = m_x * decay + row_moment
                    m_y = m_y * decay + row_total * (key_y - y)
                    if d == 3:
                        m_z = m_z * decay + row_total * (key_z - z)
        # where there is no key the moments are 0
        divisor = tl.where(total == 0, 1, total)
        lse_here = tl.where(total == 0, float("-inf"), (top + tl.log2(divisor)) * LN2)
        tl.store(lse + (b * J + j) * P + at, lse_here, mask=here)
        v_z += m_z / divisor
        v_y += m_y / divisor
        v_x += m_x / divisor
    v += b * d * P + at
    if d == 3:
        tl.store(v, v_z / J, mask=here)
    tl.store(v + (d - 2) * P, v_y / J, mask=here)
    tl.store(v + (d - 1) * P, v_x / J, mask=here)


@triton.jit
def _chunk(volume, C: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr):
    """The group and the chunk of its channels that program `volume` of a stack has."""
    chunks: tl.constexpr = (C + BLOCKS * VEC - 1) // (BLOCKS * VEC)
    return volume // chunks, (volume % chunks).to(tl.int32)


@triton.jit
def _load_vector(x, at, valid, P, d: tl.constexpr):
    """Components of x [d, P] along D (0 in 2D), H and W at voxels `at`, 0 where not `valid`."""
    along_y = tl.load(x + (d - 2) * P + at, mask=valid, other=0)
    along_z = tl.load(x + at, mask=valid, other=0) if d == 3 else tl.zeros_like(along_y)
    return along_z, along_y, tl.load(x + (d - 1) * P + at, mask=valid, other=0)


@triton.jit
def _load_lse(lse, at, valid):
    """Log-sum-exp in base 2, +inf where there is no key or where not `valid`: 2^(s - inf) = 0 for every score s."""
    natural = tl.load(lse + at, mask=valid, other=float("-inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)


@_jit
def _veu_grad_q(
    grad_v,  # [B, d, P] acc
    q,  # [B, J*C, P]
    k,  # [B, J*C, P]
    mask,  # [B, P] or None
    v,  # [B, d, P] acc
    lse,  # [B, J, P] acc
    grad_q,  # [B, J*C, P]
    delta,  # [B, J, P] acc: <grad_v, v_j>, for _veu_grad_k
    scale: tl.float64,
    programs,
    P,
    J,
    D,
    H,
    W,
    RZ,
    RY,
    RX: tl.constexpr,
    d: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    VEC: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEVERAL: tl.constexpr,  # J > 1
):
    index = program()
    if index >= programs:
        return
    ACC: tl.constexpr = v.dtype.element_ty
    factor = tl.full((1, 1), scale, ACC)
    volume, z, y0, y, x = _tile(index, D, H, W, ROWS, COLS)
    group, chunk = _chunk(volume, C, BLOCKS, VEC)
    here = (y < H) & (x < W)
    at = _row(z, y, H, W) + x
    b = group // J
    if mask is not None:
        mask += b * P
    q += group * C * P
    k += group * C * P
    query = _scaled(_load(q, at, here, P, chunk, C, BLOCKS, VEC, ACC), factor * LOG2E)
    g_z, g_y, g_x = _load_vector(grad_v + b * d * P, at, here, P, d)
    v_z, v_y, v_x = _load_vector(v + b * d * P, at, here, P, d)
    mean_delta = g_z * v_z + g_y * v_y + g_x * v_x
    top = _load_lse(lse + group * P, at, here)
    excess = tl.zeros((ROWS, COLS), ACC)
    total = _scaled(query, excess)
    weighted = total
    for key_z in range(tl.maximum(z - RZ, 0), tl.minimum(z + RZ + 1, D)):
        for key_y in range(tl.maximum(y0 - RY, 0), tl.minimum(y0 + ROWS + RY, H)):
            near = tl.abs(key_y - y) <= RY
            base = g_z * (key_z - z) + g_y * (key_y - y) - mean_delta
            for first in range(-RX, RX + 1, OFFSETS):
                at_key = _row(key_z, key_y, H, W) + first + x.to(tl.int64)
                for i in tl.static_range(OFFSETS):
                    valid = _taking_part(mask, at_key + i, x, W, first + i, RX)
                    key = _load(k + i, at_key, valid, P, chunk, C, BLOCKS, VEC, ACC)
                    score = _product(query, key, q, at, here, k + i, at_key, valid, P, chunk, factor * LOG2E, C)
                    w = tl.where(near & valid, tl.exp2(score - top), 0)
                    t = w * (base + g_x * (first + i))
                    excess += t
                    total = _added(total, t, key)
                    if SEVERAL:
                        weighted = _added(weighted, w, key)
    if SEVERAL:
        total = _added(total, -excess, weighted)
    if chunk == 0:
        tl.store(delta + group * P + at, mean_delta + excess, mask=here)
    _store(grad_q + group * C * P, at, here, _scaled(total, factor / J), P, chunk, C)


@_jit
def _veu_grad_k(
    grad_v,  # [B, d, P] acc
    q,  # [B, J*C, P]
    k,  # [B, J*C, P]
    mask,  # [B, P] or None
    lse,  # [B, J, P] acc
    delta,  # [B, J, P] acc
    grad_k,  # [B, J*C, P]
    scale: tl.float64,
    programs,
    P,
    J,
    D,
    H,
    W,
    RZ,
    RY,
    RX: tl.constexpr,
    d: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    VEC: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = program()
    if index >= programs:
        return
    ACC: tl.constexpr = lse.dtype.element_ty
    factor = tl.full((1, 1), scale, ACC)
    volume, z, y0, y, x = _tile(index, D, H, W, ROWS, COLS)
    group, chunk = _chunk(volume, C, BLOCKS, VEC)
    here = (y < H) & (x < W)
    at = _row(z, y, H, W) + x
    b = group // J
    taken = here
    if mask is not None:
        taken = here & tl.load(mask + b * P + at, mask=here, other=0)
    q += group * C * P
    k += group * C * P
    key = _scaled(_load(k, at, taken, P, chunk, C, BLOCKS, VEC, ACC), factor * LOG2E)
    total = _scaled(key, tl.zeros((ROWS, COLS), ACC))
    for query_z in range(tl.maximum(z - RZ, 0), tl.minimum(z + RZ + 1, D)):
        for query_y in range(tl.maximum(y0 - RY, 0), tl.minimum(y0 + ROWS + RY, H)):
            near = tl.abs(query_y - y) <= RY
            for first in range(-RX, RX + 1, OFFSETS):
                at_query = _row(query_z, query_y, H, W) + first + x.to(tl.int64)
                for i in tl.static_range(OFFSETS):
                    # the query at x + first + i sees this key at the opposite offset
                    valid = _taking_part(None, at_query + i, x, W, first + i, RX)
                    query = _load(q + i, at_query, valid, P, chunk, C, BLOCKS, VEC, ACC)
                    g_z, g_y, g_x = _load_vector(grad_v + b * d * P + i, at_query, valid, P, d)
                    top = _load_lse(lse + group * P + i, at_query, valid)
                    base = (
                        g_z * (z - query_z)
                        - g_x * (first + i)
                        - tl.load(delta + group * P + i + at_query, mask=valid, other=0)
                    )
                    score = _product(key, query, k, at, taken, q + i, at_query, valid, P, chunk, factor * LOG2E, C)
                    t = tl.exp2(score - top) * (base + g_y * (y - query_y))
                    total = _added(total, tl.where(near & valid, t, 0), query)
    grad_k += group * C * P
    _store(grad_k, at, taken, _scaled(total, factor / J), P, chunk, C)
    # a key that takes no part was loaded as 0: its gradient, whatever the queries around it hold
    _store(grad_k, at, here & ~taken, key, P, chunk, C)


def _plan(q, window, heads, backward):
    """How a call is cut into tiles: (the kernel's size arguments, its launch options and grid)."""
    D, H, W = volume(q)
    window = (1,) * (3 - len(window)) + tuple(window)
    # a window wider than the image sees no more than one as wide as the image
    RZ, RY, RX = (min(n // 2, size - 1) for n, size in zip(window, (D, H, W), strict=True))
    C = q.shape[1] // heads
    chunks = 1 if C <= MOST_CHANNELS else triton.cdiv(C, MOST_SHARED)
    VEC = triton.next_power_of_2(triton.cdiv(C, chunks * MOST_BLOCKS))
    BLOCKS = triton.cdiv(C, chunks * VEC)
    # forward: the query; backward: also its gradient and the weighted keys
    numbers = (3 if backward else 1) * BLOCKS * VEC * acc_dtype(q.dtype).itemsize // 4
    ROWS = 2 if H > 1 and 2 * numbers <= OWN_NUMBERS else 1
    # the widest tile that leaves the fewest threads without a voxel
    COLS = min((lanes() * warps for warps in (4, 2, 1)), key=lambda cols: triton.cdiv(W, cols) * cols)
    offsets = 1 if chunks > 1 else LOADED_NUMBERS // C if backward else MOST_OFFSETS
    turns = triton.cdiv(2 * RX + 1, offsets)
    volumes = q.shape[0] * (heads * chunks if backward else 1)
    programs = volumes * D * triton.cdiv(H, ROWS) * triton.cdiv(W, COLS)
    sizes = {
        **{"programs": programs, "P": D * H * W, "J": heads, "D": D, "H": H, "W": W, "RZ": RZ, "RY": RY, "RX": RX},
        **{"d": q.dim() - 2, "C": C, "BLOCKS": BLOCKS, "VEC": VEC},
        **{"OFFSETS": triton.cdiv(2 * RX + 1, turns), "ROWS": ROWS, "COLS": COLS},
    }
    return sizes, {"num_warps": COLS // lanes()}, grid(programs)


def veu_fwd(q, k, window, heads, scale, mask):
    """See `reference.veu_fwd`. Allocates its outputs only."""
    q, k, mask = q.contiguous(), k.contiguous(), None if mask is None else mask.contiguous()
    B, _, *S = q.shape
    v = q.new_empty((B, len(S), *S), dtype=acc_dtype(q.dtype))
    lse = q.new_empty((B, heads, *S), dtype=acc_dtype(q.dtype))
    if B:
        sizes, options, blocks = _plan(q, window, heads, backward=False)
        with on_device(q):
            _veu_fwd[blocks](q, k, mask, v, lse, scale, **sizes, **options)
    return v, lse


def veu_bwd(grad_v, q, k, v, lse, window, heads, scale, mask):
    """See `reference.veu_bwd`. Allocates its outputs and <grad_v, v_j>, the size of `lse`."""
    grad_v, q, k, v, lse = (t.contiguous() for t in (grad_v, q, k, v, lse))
    mask = None if mask is None else mask.contiguous()
    grad_q, grad_k, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(lse)
    if len(q):
        sizes, options, blocks = _plan(q, window, heads, backward=True)
        with on_device(q):
            saved = (grad_v, q, k, mask, v, lse)
            _veu_grad_q[blocks](*saved, grad_q, delta, scale, **sizes, SEVERAL=heads > 1, **options)
            _veu_grad_k[blocks](grad_v, q, k, mask, lse, delta, grad_k, scale, **sizes, **options)
    return grad_q, grad_k
