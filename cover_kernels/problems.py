"""Calls of the operators by their sizes: their tensors, and the least that each pass has to compute and to move.

Shapes: B batch, J groups, C channels of one group (veu) or of the image (warp), S spatial shape, d its dimensions, N
window.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

import cover_kernels
from cover_kernels.checks import acc_dtype

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward + backward")
# What a softmax asks at least of the multiply-add units for each exponential: a polynomial of degree 2 beside a table,
# its product with the table's value, and the innermost moment. Maximum, sums and the table may run beside them
SOFTMAX = 4


@dataclass(frozen=True)
class Work:
    """The least that a call has to do: a floor under the time of any implementation.

    flops: multiply-adds, times two; of veu the products of channels alone, recomputed in the backward.
    bytes: of each tensor once that must be read or written.
    pairs: of a query and a key inside its window and the image, over all groups; of veu alone.
    exponentials: of veu's softmax, recomputed in the backward.
    """

    flops: int
    bytes: int
    pairs: int = 0
    exponentials: int = 0

    def __add__(self, other: "Work") -> "Work":
        # the pairs are the same ones, visited again
        pairs = max(self.pairs, other.pairs)
        return Work(self.flops + other.flops, self.bytes + other.bytes, pairs, self.exponentials + other.exponentials)


def window_pairs(S: tuple[int, ...], window: tuple[int, ...]) -> int:
    """Pairs of a query and a key in an image of shape S, the key inside the query's window and the image."""

    def along(size: int, width: int) -> int:
        r = width // 2
        return sum(min(p + r, size - 1) - max(p - r, 0) + 1 for p in range(size))

    return prod(along(size, width) for size, width in zip(S, window, strict=True))


def _name(operator: str, shape, dtype: torch.dtype, *settings: str) -> str:
    return " ".join((operator, "x".join(map(str, shape)), *settings, str(dtype).removeprefix("torch.")))


def _normal(device: str, dtype: torch.dtype, *shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _smooth_flow(B: int, S: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """A flow of some voxels that changes over about 16 of them, [B, d, *S]."""
    generator = torch.Generator().manual_seed(1)
    coarse = 3 * torch.randn(B, len(S), *(max(1, n // 16) for n in S), generator=generator)
    return F.interpolate(coarse, size=S, mode="bilinear" if len(S) == 2 else "trilinear").to(device, dtype)


@dataclass(frozen=True)
class Veu:
    """veu of q and k, [B, J*C, *S]; see `cover_kernels.veu`."""

    S: tuple[int, ...]
    window: int
    channels: int = 8
    heads: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self):
        shape = (self.batch, self.heads * self.channels, *self.S)
        return _name("veu", shape, self.dtype, f"N={self.window}", f"J={self.heads}")

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        shape = (self.batch, self.heads * self.channels, *self.S)
        return _normal(device, self.dtype, shape, shape)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return cover_kernels.veu(q, k, self.window, self.heads)

    def work(self, which: str) -> Work:
        if which == BOTH:
            return self.work(FORWARD) + self.work(BACKWARD)
        pairs = self.batch * self.heads * window_pairs(self.S, (self.window,) * len(self.S))
        voxels, acc = self.batch * prod(self.S), acc_dtype(self.dtype).itemsize
        features = 2 * voxels * self.heads * self.channels * self.dtype.itemsize  # q and k, or their gradients
        results = voxels * (len(self.S) + self.heads) * acc  # v, or its gradient; log-sum-exp
        if which == FORWARD:
            return Work(2 * self.channels * pairs, features + results, pairs, pairs)
        # two gathers, each with the scores again
        return Work(8 * self.channels * pairs, 2 * features + results, pairs, 2 * pairs)


@dataclass(frozen=True)
class Warp:
    """warp of an image [B, C, *S] by a smooth flow [B, d, *(S / stride)]; see `cover_kernels.warp`."""

    S: tuple[int, ...]
    channels: int
    stride: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self):
        settings = [f"s={self.stride}"] if self.stride > 1 else []
        return _name("warp", (self.batch, self.channels, *self.S), self.dtype, *settings)

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        (x,) = _normal(device, self.dtype, (self.batch, self.channels, *self.S))
        coarse = tuple(n // self.stride for n in self.S)
        return [x, _smooth_flow(self.batch, coarse, device, self.dtype).requires_grad_()]

    def __call__(self, x: Tensor, flow: Tensor) -> Tensor:
        return cover_kernels.warp(x, flow, self.stride)

    def work(self, which: str) -> Work:
        if which == BOTH:
            return self.work(FORWARD) + self.work(BACKWARD)
        voxels, d = self.batch * prod(self.S), len(self.S)
        image = voxels * self.channels * self.dtype.itemsize
        flow = voxels // self.stride**d * d * self.dtype.itemsize
        flops = 2 * 2**d * voxels * self.channels
        if which == FORWARD:
            return Work(flops, 2 * image + flow)
        # for the gradient of the image, and for that of the flow
        return Work(2 * flops, 3 * image + 2 * flow)


@dataclass(frozen=True)
class Compose:
    """compose of a smooth flow [B, d, *(S / stride)] after a residual [B, d, *S]; see `cover_kernels.compose`."""

    S: tuple[int, ...]
    stride: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return _name("compose", (self.batch, len(self.S), *self.S), self.dtype, f"s={self.stride}")

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        (residual,) = _normal(device, self.dtype, (self.batch, len(self.S), *self.S))
        coarse = tuple(n // self.stride for n in self.S)
        return [_smooth_flow(self.batch, coarse, device, self.dtype).requires_grad_(), residual]

    def __call__(self, flow: Tensor, residual: Tensor) -> Tensor:
        return cover_kernels.compose(flow, residual, self.stride)

    def work(self, which: str) -> Work:
        if which == BOTH:
            return self.work(FORWARD) + self.work(BACKWARD)
        voxels, d = self.batch * prod(self.S), len(self.S)
        fine = voxels * d * self.dtype.itemsize
        coarse = fine // self.stride**d
        flops = 2 * 2**d * voxels * d
        if which == FORWARD:
            return Work(flops, 2 * fine + coarse)
        return Work(2 * flops, 3 * fine + 2 * coarse)


Problem = Veu | Warp | Compose
