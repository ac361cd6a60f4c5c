"""The operators as one writes them by hand in PyTorch: a loop over offsets, a sampling grid and grid_sample.

Signatures and conventions are those of `cover_kernels`. What does not depend on the tensors' values is made once.
"""

import contextlib
from functools import lru_cache
from itertools import product as combinations
from unittest import mock

import torch
import torch.nn.functional as F

from cover_kernels.checks import per_axis


@lru_cache(maxsize=4)
def make_window(S, window, device):
    """(offsets of the window [O, d], bool [O, 1, 1, *S]: the key at p + o is outside the image)."""
    radii = [n // 2 for n in window]
    offsets = torch.tensor(list(combinations(*(range(-r, r + 1) for r in radii))), device=device)
    key = identity(S, device, torch.long) + offsets.view(*offsets.shape, *[1] * len(S))
    size = torch.tensor(S, device=device).view(-1, *[1] * len(S))
    return offsets.float(), ((key < 0) | (key >= size)).any(1)[:, None, None]


@lru_cache(maxsize=4)
def identity(S, device, dtype=torch.float32):
    """The position of every voxel, [d, *S]."""
    return torch.stack(torch.meshgrid(*[torch.arange(n, device=device, dtype=dtype) for n in S], indexing="ij"))


def shifted(x, window):
    """Views of x [..., *S], zero beyond its border: for each offset of the window, what lies at p + o."""
    S = x.shape[-len(window) :]
    padded = F.pad(x, [n // 2 for n in reversed(window) for _ in (0, 1)])
    for start in combinations(*map(range, window)):
        yield padded[(..., *(slice(i, i + n) for i, n in zip(start, S, strict=True)))]


def veu(q, k, window, heads=1, scale=None, mask=None):
    S = q.shape[2:]
    window = tuple(per_axis("veu", "window", window, len(S)))
    offsets, outside = make_window(S, window, q.device)
    if mask is not None:
        outside = outside | ~torch.stack(list(shifted(mask, window)))
    return attend(q, k, window, heads, scale, offsets, outside)


def attend(q, k, window, heads, scale, offsets, outside):
    """veu, the offsets and which of them lead outside being known."""
    q, k = (x.unflatten(1, (heads, -1)) for x in (q, k))
    q = q * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = torch.stack([(q * at).sum(2) for at in shifted(k, window)])
    w = scores.float().masked_fill(outside, -torch.inf).softmax(0).mean(2)
    return torch.einsum("ob...,od->bd...", w, offsets)


def attend_in_place(q, k, window, heads, scale, offsets, outside):
    """The same without a gradient: products and scores are written where the last ones were."""
    q, k = (x.unflatten(1, (heads, -1)) for x in (q, k))
    q = q * (q.shape[2] ** -0.5 if scale is None else scale)
    scores, product = q.new_empty(len(offsets), *q.shape[:2], *q.shape[3:]), torch.empty_like(q)
    for score, at in zip(scores, shifted(k, window), strict=True):
        torch.sum(torch.mul(q, at, out=product), 2, out=score)
    w = scores.float().masked_fill_(outside, -torch.inf).softmax(0).mean(2)
    return torch.einsum("ob...,od->bd...", w, offsets)


def sample(x, position, padding):
    """x [B, C, *S] at `position` [B, d, *P], in voxels of x."""
    size = torch.tensor(x.shape[2:], device=x.device, dtype=position.dtype).view(-1, *[1] * (x.dim() - 2))
    grid = ((position + 0.5) * (2 / size) - 1).flip(1).movedim(1, -1)
    return F.grid_sample(x, grid.to(x.dtype), align_corners=False, padding_mode=padding)


def upsample(flow, stride):
    if all(s == 1 for s in stride):
        return flow
    up = F.interpolate(flow, scale_factor=stride, mode="bilinear" if len(stride) == 2 else "trilinear")
    return up * torch.tensor(stride, device=flow.device, dtype=flow.dtype).view(-1, *[1] * len(stride))


def warp(x, flow, stride=1, padding="zeros"):
    S = x.shape[2:]
    stride = tuple(map(float, per_axis("warp", "stride", stride, len(S))))
    return sample(x, identity(S, x.device, flow.dtype) + upsample(flow, stride), padding)


def compose(flow, residual, stride=1):
    """The coarse flow, sampled where p + residual(p) lies on its own level."""
    S = residual.shape[2:]
    stride = per_axis("compose", "stride", stride, len(S))
    s = torch.tensor(stride, device=flow.device, dtype=residual.dtype).view(-1, *[1] * len(S))
    position = (identity(S, flow.device, residual.dtype) + residual + 0.5) / s - 0.5
    return residual + s * sample(flow, position, "border")


def compose_chain(flow, residual, stride=1):
    """Upsample, grid, sample, add: interpolates an interpolation, so that it differs a little from the definition."""
    S = residual.shape[2:]
    stride = tuple(map(float, per_axis("compose", "stride", stride, len(S))))
    position = identity(S, flow.device, residual.dtype) + residual
    return residual + sample(upsample(flow, stride), position, "border")


@contextlib.contextmanager
def by_hand():
    """Within the block, the model and its losses call the eager operators."""
    with contextlib.ExitStack() as stack:
        for module, names in (("cover.pyramid", ("veu", "warp", "compose")), ("cover.losses", ("warp",))):
            stack.enter_context(mock.patch.multiple(module, **{name: globals()[name] for name in names}))
        yield
