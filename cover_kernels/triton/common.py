"""What the Triton kernels share: the launch, linear interpolation, and sums that do not depend on their order.

Shape legend (schemas.py): B batch, C channels, d spatial dimensions, S = (D, H, W) spatial shape, P = D * H * W
voxels. A 2D problem is a 3D one with D = 1. `acc` is the accumulation type: float64 for float64, float32 for all
others; everything is converted to it right after it was loaded.
"""

import torch
import triton
import triton.language as tl

# Programs along the first axis of a grid: with 2^23 of 256 threads, AMD's limit of 2^32 threads holds too. The second
# axis takes what is beyond, up to 2^38 programs.
GRID_WIDTH = 2**23
BLOCK = 128  # voxels of a program that interpolates, one per thread
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def grid(programs):
    """The launch grid of that many programs; a few too many where one axis cannot hold them (see `program`)."""
    rows = triton.cdiv(programs, GRID_WIDTH)
    return triton.cdiv(programs, rows), rows


@triton.jit
def program():
    """Linear index of this program, int64. A kernel returns at once where it is not below the number of programs."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


def volume(x):
    """(D, H, W) of x [B, C, *S], D = 1 in 2D."""
    return (1,) * (5 - x.dim()) + tuple(x.shape[2:])


def lanes():
    """Threads of a warp of the current device: 32, on most AMD GPUs 64."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def on_device(x):
    """Context in which the device of x is current; changes nothing for CPU tensors, which the interpreter takes."""
    return torch.cuda.device_of(x)


def index_type(voxels):
    """The narrowest type that counts the voxels of a volume, those of a last, incomplete block included."""
    return tl.int32 if voxels < 2**31 - BLOCK else tl.int64


@triton.jit
def to_acc(x):
    """x in its accumulation type. (The interpreter stores bfloat16 as integers: arithmetic on it is wrong there.)"""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def block_of_voxels(index, P, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """Block `index` of a stack of volumes: the volume (int64), voxels [BLOCK] in INDEX, and which of them exist."""
    blocks = tl.cdiv(P, BLOCK)
    voxel = (index % blocks * BLOCK).to(INDEX) + tl.arange(0, BLOCK)
    return index // blocks, voxel, voxel < P


@triton.jit
def voxel_position(voxel, H, W, ACC: tl.constexpr):
    """Coordinates of voxels [BLOCK] along D, H and W."""
    return (voxel // W // H).to(ACC), (voxel // W % H).to(ACC), (voxel % W).to(ACC)


@triton.jit
def coarse_position(p, stride):
    """Where a position of a level lies on the level that is coarser by `stride`, correctly rounded."""
    centre, stride = p + 0.5, tl.cast(stride, p.dtype)
    # division of float32 is approximate otherwise, and a position on a voxel must stay there
    return (centre / stride if p.dtype == tl.float64 else tl.div_rn(centre, stride)) - 0.5


@triton.jit
def _axis(position, size, BORDER: tl.constexpr):
    """A cell along one axis: its first voxel (int32), the fraction in it, and 1 where the position moves, 0 where it
    was clamped. A NaN position has a NaN fraction."""
    last = tl.cast(size - 1, position.dtype)
    low = tl.cast(0 if BORDER else -1, position.dtype)
    high = last if BORDER else last + 1
    clamped = tl.where(position < low, low, tl.where(position > high, high, position))
    # at the far border itself, clamping begins
    moves = (position >= low) & ((position < high) if BORDER else (position <= high))
    first = tl.floor(tl.where(clamped == clamped, clamped, 0))
    return first.to(tl.int32), clamped - first, moves.to(position.dtype)


@triton.jit
def find_cell(z, y, x, D, H, W, BORDER: tl.constexpr):
    """The cells around positions [BLOCK] in a volume: first voxel, fraction and slope along each axis.

    In 2D, z is 0. With BORDER the position is clamped into the volume, else what lies outside is 0.
    """
    return _axis(z, D, BORDER), _axis(y, H, BORDER), _axis(x, W, BORDER)


@triton.jit
def _factor(axis, BIT: tl.constexpr):
    return axis[1] if BIT else 1 - axis[1]


@triton.jit
def _slope(axis, BIT: tl.constexpr):
    return axis[2] if BIT else -axis[2]


@triton.jit
def _inside(axis, size, BIT: tl.constexpr):
    return (axis[0] + BIT >= 0) & (axis[0] + BIT < size)


@triton.jit
def _clamp(axis, size, BIT: tl.constexpr):
    return tl.minimum(tl.maximum(axis[0] + BIT, 0), size - 1)


@triton.jit
def find_corners(cell, D, H, W, d: tl.constexpr, INDEX: tl.constexpr):
    """The 2^d corners of each cell: indices into the volume, weights, and which corners count, a tuple each.

    A corner outside the volume does not count: it has weight 0. A NaN position gives NaN weights. Corner k takes the
    second voxel along W where bit 0 of k is set, along H and D for bits 1 and 2.
    """
    indices, weights, counted = (), (), ()
    for k in tl.static_range(2**d):
        weight = _factor(cell[0], k // 4) * _factor(cell[1], k // 2 % 2) * _factor(cell[2], k % 2)
        inside = _inside(cell[0], D, k // 4) & _inside(cell[1], H, k // 2 % 2) & _inside(cell[2], W, k % 2)
        counts = inside | (weight != weight)
        row = _clamp(cell[0], D, k // 4).to(INDEX) * H + _clamp(cell[1], H, k // 2 % 2)
        indices = indices + (row * W + _clamp(cell[2], W, k % 2),)
        weights = weights + (tl.where(counts, weight, 0),)
        counted = counted + (counts,)
    return indices, weights, counted


@triton.jit
def sample(x, indices, weights, valid):
    """Volume x [P] at cells [BLOCK], in acc. A cell on a voxel returns its very bits."""
    ACC: tl.constexpr = weights[0].dtype
    # a corner of weight 0 adds nothing, whatever it holds; and -0.0, which tl.zeros cannot say, changes no sum
    total = tl.zeros(weights[0].shape, ACC) * -1.0
    for k in tl.static_range(len(weights)):
        value = tl.load(x + indices[k], mask=valid & (weights[k] != 0), other=0).to(ACC)
        total = tl.where(weights[k] == 0, total, total + weights[k] * value)
    return total


@triton.jit
def position_gradient(cell, products, counted, d: tl.constexpr):
    """Gradients with respect to the position along D (0 in 2D), H and W, from the products [2^d] of the corners'
    values with the gradient."""
    along_z = tl.zeros(products[0].shape, products[0].dtype)
    along_y, along_x = along_z, along_z
    for k in tl.static_range(2**d):
        f_z, f_y, f_x = _factor(cell[0], k // 4), _factor(cell[1], k // 2 % 2), _factor(cell[2], k % 2)
        if d == 3:
            along_z += tl.where(counted[k], _slope(cell[0], k // 4) * f_y * f_x, 0) * products[k]
        along_y += tl.where(counted[k], f_z * _slope(cell[1], k // 2 % 2) * f_x, 0) * products[k]
        along_x += tl.where(counted[k], f_z * f_y * _slope(cell[2], k % 2), 0) * products[k]
    return along_z, along_y, along_x


# Sums of a scatter. The fast ones are float atomics into `sums` [volumes, P] acc, in no fixed order. The deterministic
# ones are integers, which add up to the same in any order: each number is rounded to a multiple of 2^-scale, with
# scale such that the sums of a volume cannot overflow 63 bits, whatever is added where:
#
#     |number| < 2^exponent,   `terms` numbers at most   ->   scale = spare - exponent,   spare = 62 - ceil(log2(terms))
#
# The exponent is that of the largest finite gradient in the volume, found on the device. A number is off by at most
# 2^-(scale + 1), that is 2^-(spare) of the largest one: 2^-41 for 2^21 voxels, where a rounding of float32 is 2^-24.
# float64 carries a second word, with `spare` more bits, for what the first rounds off. A number that is NaN or infinite
# makes the sum NaN: that is marked in the output before the sums are brought there.


@triton.jit
def _power_of_two(e):
    """2^e in float64, for -1023 < e < 1024."""
    return (tl.cast(e + 1023, tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent_kernel(x, exponents, programs, P, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """exponents[i] = that of the largest finite number in volume i of x [volumes, P], biased as in float64."""
    index = program()
    if index >= programs:
        return
    i, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    number = to_acc(tl.load(x + i * P + voxel, mask=valid, other=0))
    bits = number.to(tl.float64).to(tl.int64, bitcast=True)
    biased = (bits >> 52) & 2047
    tl.atomic_max(exponents + i, tl.max(tl.where(biased == 2047, 0, biased)).to(tl.int32), sem="relaxed")


@triton.jit
def load_scale(exponents, i, spare):
    """The scale of volume i's sums."""
    return tl.minimum(spare + 1022 - tl.load(exponents + i), 1022)


@triton.jit
def scatter(sums, words, out, at, number, valid, scale, spare, WORDS: tl.constexpr):
    """Add numbers [BLOCK] at `at` into `sums` in WORDS integers, `words` apart, or in floating point (WORDS = 0)."""
    if WORDS == 0:
        tl.atomic_add(sums + at, number, mask=valid, sem="relaxed")
    else:
        finite = tl.abs(number) < float("inf")
        scaled = tl.where(finite, number, 0).to(tl.float64) * _power_of_two(scale)
        rounded = tl.floor(scaled + 0.5)
        tl.atomic_add(sums + at, rounded.to(tl.int64), mask=valid, sem="relaxed")
        if WORDS == 2:
            rest = ((scaled - rounded) * _power_of_two(spare)).to(tl.int64)
            tl.atomic_add(sums + words + at, rest, mask=valid, sem="relaxed")
        tl.store(out + at, float("nan"), mask=valid & ~finite)


@triton.jit
def _finish_kernel(
    sums, words, out, exponents, programs, P, spare, WORDS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """out [volumes, P] = the integer sums, but NaN where it was marked."""
    index = program()
    if index >= programs:
        return
    i, voxel, valid = block_of_voxels(index, P, BLOCK, INDEX)
    at = i * P + voxel
    total = tl.load(sums + at, mask=valid, other=0).to(tl.float64)
    if WORDS == 2:
        total += tl.load(sums + words + at, mask=valid, other=0).to(tl.float64) * _power_of_two(-spare)
    total *= _power_of_two(-load_scale(exponents, i, spare))
    marked = to_acc(tl.load(out + at, mask=valid, other=0))
    tl.store(out + at, tl.where(marked == marked, total.to(marked.dtype), float("nan")), mask=valid)


class Scatter:
    """The sums of one backward: what the kernel adds to (`arguments`), and `finish`, which brings it to the output.

    The output, `like` [B, C, *S], starts as zeros. The workspace is an acc tensor of its shape where it is half
    precision, and for deterministic sums one int64 tensor, two for float64, and an int32 per volume.
    """

    def __init__(self, like, grad, terms, deterministic):
        self.out = torch.zeros_like(like)
        self.sums, self.exponents, self.spare, self.words = self.out, None, 0, 0
        if deterministic:
            self.words = 2 if like.dtype == torch.float64 else 1
            self.spare = 62 - (terms - 1).bit_length()
            self.sums = like.new_zeros((self.words, *like.shape), dtype=torch.int64)
            self.exponents = like.new_zeros(like.shape[:2], dtype=torch.int32)
            launch(_exponent_kernel, grad, grad.shape[0] * grad.shape[1], grad, self.exponents)
        elif like.dtype in (torch.bfloat16, torch.float16):
            self.sums = torch.zeros_like(like, dtype=torch.float32)

    def arguments(self):
        """Of a kernel that scatters."""
        words = {"words": self.out.numel(), "spare": self.spare, "WORDS": self.words}
        return {"sums": self.sums, "out": self.out, "exponents": self.exponents, **words}

    def finish(self):
        if self.words:
            launch(_finish_kernel, self.out, self.exponents.numel(), **self.arguments())
        elif self.sums is not self.out:
            self.out.copy_(self.sums)
        return self.out


def launch(kernel, x, volumes, *args, **kwargs):
    """Run a kernel over blocks of voxels of so many volumes of the size of x's."""
    P = x[0, 0].numel()
    programs = volumes * triton.cdiv(P, BLOCK)
    kwargs.update(programs=programs, P=P, BLOCK=BLOCK, INDEX=index_type(P), num_warps=max(1, BLOCK // lanes()))
    kernel[grid(programs)](*args, **kwargs)
