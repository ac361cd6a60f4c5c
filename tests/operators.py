"""Inputs, tolerance and backends that the operators' tests share: one table per operator, each row saying why.

The environment variable COVER_TEST_DEVICE names the device that the operators are tested on, "cpu" if it is not set.
"""

import os
from dataclasses import dataclass

import torch

import cover_kernels
from cover_kernels.backends import serving

DEVICE = os.environ.get("COVER_TEST_DEVICE", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("veu", "warp", "compose")


@dataclass(frozen=True)
class Case:
    why: str
    S: tuple[int, ...]
    B: int = 2
    channels: int = 3  # of one group (veu), of the image (warp)
    heads: int = 1
    window: tuple[int, ...] | int = 3
    mask: str = ""  # "", "random" or "none valid"
    stride: tuple[int, ...] | int = 1
    padding: str = "zeros"
    layout: str = "contiguous"

    def __str__(self):
        return self.why.replace(" ", "-")


CASES = {
    "veu": [
        Case("one voxel", (1, 1)),
        Case("window of one", (4, 5), window=1),
        Case("tails on both axes", (5, 19), channels=8, window=7),
        Case("several tiles along both axes", (19, 70), channels=40, window=5),
        Case("row longer than a tile", (3, 600), B=1, channels=16, window=3),
        Case("window wider than image", (3, 4), channels=2, window=21),
        Case("window of several chunks", (6, 40), channels=1, window=(3, 19)),
        Case("groups", (9, 11), channels=8, heads=3, window=5),
        Case("groups side by side", (5, 24), channels=8, heads=4, window=7),
        Case("volume, groups side by side, window of several chunks", (2, 3, 12), heads=8, window=(3, 3, 19)),
        Case("groups of many channels side by side", (2, 12), B=1, channels=600, heads=4),
        Case("groups and mask", (9, 18), channels=3, heads=2, window=(7, 3), mask="random"),
        Case("no valid key", (4, 5), channels=2, heads=2, mask="none valid"),
        Case("volume", (4, 6, 18), channels=8, window=5, mask="random"),
        Case("volume, anisotropic window", (5, 9, 7), channels=2, heads=2, window=(3, 7, 7)),
        Case("volume of several slabs of tiles", (9, 18, 5), channels=2, heads=2),
        Case("volume, window wider than image", (2, 3, 4), channels=1, window=(9, 1, 11)),
        Case("channels last", (6, 7), channels=4, heads=2, layout="channels_last"),
        Case("not contiguous", (3, 5, 6), channels=4, layout="sliced"),
        Case("empty batch", (4, 5), B=0),
    ],
    "warp": [
        Case("one voxel", (1, 1)),
        Case("odd sizes", (5, 7), padding="border"),
        Case("odd sizes, many channels", (5, 7), channels=9),
        Case("row longer than a segment", (2, 530), channels=9),
        Case("row longer than a segment, few channels", (2, 530), padding="border"),
        Case("one voxel wide", (6, 1), padding="zeros"),
        Case("one voxel wide, many channels", (6, 1), channels=9),
        Case("coarser flow", (8, 12), stride=2, padding="border"),
        Case("coarser flow, one axis", (4, 16), stride=(1, 4)),
        Case("volume", (4, 5, 9), channels=5),
        Case("volume, few channels", (4, 5, 19), channels=2),
        Case("volume, coarser flow", (4, 8, 6), stride=2, padding="border"),
        Case("volume, anisotropic stride", (3, 8, 8), stride=(1, 2, 4)),
        Case("channels last", (6, 8), layout="channels_last"),
        Case("channels last, worked on as it is", (7, 70), channels=16, padding="border", layout="channels_last"),
        Case("volume, channels last, coarser flow", (4, 6, 8), channels=8, stride=2, layout="channels_last"),
        Case("not contiguous", (4, 4, 6), stride=2, layout="sliced"),
        Case("empty batch", (4, 6), B=0),
    ],
    "compose": [
        Case("one voxel", (1, 1)),
        Case("same level", (5, 7)),
        Case("row longer than a segment", (2, 530), stride=(1, 2)),
        Case("coarser flow", (8, 6), stride=2),
        Case("volume", (3, 5, 4)),
        Case("volume, anisotropic stride", (3, 8, 8), stride=(1, 2, 4)),
        Case("channels last", (6, 8), layout="channels_last"),
        Case("not contiguous", (4, 4, 6), stride=2, layout="sliced"),
        Case("empty batch", (4, 6), B=0),
    ],
}
# ways of being cut that only the CUDA kernels know: tested on a GPU, and in test_cuda_on_cpu.py
CUDA_CASES = {
    "veu": [
        Case("most channels of a kernel of its own", (5, 18), B=1, channels=32, window=3),
        Case("volume, kernel of its own and groups", (3, 5, 9), B=1, channels=8, heads=2, window=7, mask="random"),
        Case("window of its own kernel, another depth", (4, 5, 9), B=1, channels=8, window=(1, 5, 5)),
        Case("several tiles in depth", (3, 17, 35), B=1, channels=8, window=5),
        # on tensor cores in bfloat16 and float16; rows of a multiple of 4 are read 4 voxels at a time
        Case("tensor cores, several tiles", (19, 36), B=1, channels=32, window=7),
        Case("tensor cores, groups and mask", (9, 22), channels=32, heads=2, window=5, mask="random"),
        Case("tensor cores, mask and whole words", (6, 20), B=1, channels=16, heads=2, window=7, mask="random"),
        Case("tensor cores, window wider than image", (3, 4), channels=32, window=5),
        Case("tensor cores, no valid key", (4, 5), B=1, channels=32, heads=2, mask="none valid"),
        Case("tensor cores, volume, anisotropic window", (4, 9, 6), B=1, channels=32, window=(3, 7, 7)),
        Case("tensor cores, volume, groups and mask", (3, 9, 20), B=1, channels=32, heads=2, window=5, mask="random"),
    ],
    "warp": [],
    "compose": [],
}
PARAMETERS = [
    (operator, case)
    for operator in OPERATORS
    for case in (*CASES[operator], *(CUDA_CASES[operator] if DEVICE != "cpu" else ()))
]


def _laid_out(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def sample_inputs(operator, case, dtype, seed=0):
    """(function of the differentiable tensors, those tensors) for one row of the table.

    Flows are multiples of 1/8: exact in every dtype, so that a position lies in the same cell whatever the precision
    (a derivative jumps from cell to cell).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    d, S = len(case.S), case.S

    def normal(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return _laid_out(x.to(DEVICE, dtype), case.layout)

    def flow(*shape):
        eighths = torch.randint(-20, 21, shape, generator=generator, dtype=torch.float64, device="cpu")
        return _laid_out((eighths / 8).to(DEVICE, dtype), case.layout)

    stride = (case.stride,) * d if isinstance(case.stride, int) else case.stride
    coarse = [size // s for size, s in zip(S, stride, strict=True)]
    if operator == "veu":
        mask = None
        if case.mask:
            share = 0.7 if case.mask == "random" else 0
            mask = (torch.rand((case.B, 1, *S), generator=generator, device="cpu") < share).to(DEVICE)
        q, k = normal(case.B, case.heads * case.channels, *S), normal(case.B, case.heads * case.channels, *S)
        return lambda q, k: cover_kernels.veu(q, k, case.window, case.heads, mask=mask), (q, k)
    if operator == "warp":
        x = normal(case.B, case.channels, *S)
        return lambda x, u: cover_kernels.warp(x, u, stride, case.padding), (x, flow(case.B, d, *coarse))
    return lambda u, w: cover_kernels.compose(u, w, stride), (flow(case.B, d, *coarse), flow(case.B, d, *S))


def run(function, tensors, backend, grad=None):
    """[output, gradients...] on one backend. Output and gradients are allocated full of NaN."""
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        with cover_kernels.use_backend(backend):
            y = function(*tensors)
            grads = torch.autograd.grad(y, tensors, torch.ones_like(y) if grad is None else grad.to(y.dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    return [y.detach(), *grads]


def grad_like(y):
    """A gradient that bf16 and fp16 hold exactly."""
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(-8, 9, y.shape, generator=generator, device="cpu").to(y) / 4


def assert_close(actual, same_dtype, exact):
    """The project's tolerance: the error against float64 is at most twice that of plain PyTorch in the same dtype,
    plus sixteen roundings of the largest value (sums of hundreds of terms in another order). In float64 plain PyTorch
    is what we compare with: its error is taken to be the 6 roundings that it has on the mean in float32."""
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert a.shape == e.shape
        assert not a.isnan().any()
        if a.numel() == 0:
            continue
        floor = (28 if a.dtype == torch.float64 else 16) * torch.finfo(a.dtype).eps * e.abs().max().item()
        error, allowed = (a.double() - e).abs().max().item(), 2 * (s.double() - e).abs().max().item() + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def compiled_backends():
    """Backends other than the reference that serve the device under test."""
    return [name for name in serving(DEVICE) if name != "reference"]
