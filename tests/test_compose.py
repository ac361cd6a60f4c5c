"""compose against its definition: exact on zero and integer fields, an affine field undone by its inverse."""

import math

import pytest
import torch
from operators import DTYPES

from cover_kernels import compose


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("S", "stride"), [((5, 7), 1), ((6, 4), 2), ((4, 6, 8), (1, 3, 2))])
def test_composing_with_zero_is_exact(backend, dtype, S, stride):
    steps = (stride,) * len(S) if isinstance(stride, int) else stride
    w = (3 * torch.randn(2, len(S), *S)).to(dtype)
    flow = torch.zeros(2, len(S), *(n // s for n, s in zip(S, steps, strict=True)), dtype=dtype)
    assert torch.equal(compose(flow, w, stride), w)
    if all(s == 1 for s in steps):
        assert torch.equal(compose(w, flow), w)


def test_composing_with_an_integer_shift_reads_the_shifted_flow(backend):
    flow = torch.randn(1, 2, 6, 8)
    shift = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8)
    y = compose(flow, shift)
    assert torch.equal(y[:, :, :4, 1:], flow[:, :, 2:, :-1] + shift[:, :, :4, 1:])
    # beyond the border the flow is that of the nearest voxel
    assert torch.equal(y[:, :, 4:, 1:], (flow[:, :, -1:, :-1] + shift[:, :, :1, 1:]).expand(1, 2, 2, 7))


def affine(matrix, offset, S):
    """The displacement field of p -> matrix (p - centre) + centre + offset."""
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in S], indexing="ij")
    centre = (torch.tensor(S, dtype=torch.float64) - 1) / 2
    p = torch.stack(axes, -1) - centre
    return (p @ matrix.T + offset - p).movedim(-1, 0).unsqueeze(0)


@pytest.mark.parametrize("S", [(40, 44), (16, 18, 20)])
def test_affine_field_and_its_inverse_cancel_away_from_the_border(backend, S):
    d = len(S)
    angle = math.radians(10)
    matrix = torch.eye(d, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * 1.05
    offset = torch.tensor([0.7, -0.4, 0.3], dtype=torch.float64)[:d]
    inverse = torch.linalg.inv(matrix)
    there, back = affine(matrix, offset, S), affine(inverse, -inverse @ offset, S)
    inner = (..., *(slice(n // 4, -(n // 4)) for n in S))
    # a linear field is interpolated without error
    assert compose(there, back)[inner].abs().max() < 1e-12


def test_stride_takes_the_flow_at_its_own_level(backend):
    """Of a linear coarse flow, the upsampled one is known in closed form at any position."""
    coarse = torch.arange(8, dtype=torch.float64).view(1, 1, 1, 8).expand(1, 2, 4, 8) * 0.1
    w = torch.rand(1, 2, 8, 16, dtype=torch.float64) - 0.5
    position = torch.arange(16) + w[:, 1]
    expected = w + (2 * 0.1 * ((position + 0.5) / 2 - 0.5)).unsqueeze(1)
    torch.testing.assert_close(compose(coarse, w, 2)[..., 2:-2], expected[..., 2:-2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"residual": torch.zeros(1, 3, 4, 6)}, ValueError, "compose: `residual` must have 2 channels"),
        ({"flow": torch.zeros(1, 2, 4, 5)}, ValueError, r"compose: `flow` must have shape \[1, 2, 4, 6\]"),
        ({"flow": torch.zeros(1, 2, 4, 6).half()}, TypeError, "compose: `flow` must be torch.float32"),
        ({"stride": (1, 2, 3)}, ValueError, "compose: `stride` must be a positive int or 2 of them"),
        ({"stride": 5}, ValueError, "compose: `stride` must divide the spatial shape of `residual`"),
    ],
)
def test_bad_arguments_are_named(backend, changes, error, message):
    with pytest.raises(error, match=message):
        compose(**{"flow": torch.zeros(1, 2, 4, 6), "residual": torch.zeros(1, 2, 4, 6), **changes})
