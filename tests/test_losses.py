"""The losses follow their formulas, and stay finite, with finite gradients, where features or the mask are empty."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cover.losses import consistency_loss, epe, feature_variance, mean_epe, vector_loss

SHAPES = [(7, 5), (4, 5, 3)]


def batch(S, B=2, C=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(channels):
        return torch.randn(B, channels, *S, dtype=torch.float64, generator=generator)

    mask = torch.rand(B, 1, *S, generator=generator) < 0.6
    return normal(C), normal(C), normal(len(S)), normal(len(S)), mask


@pytest.mark.parametrize("S", SHAPES)
def test_vector_loss_is_the_mean_absolute_error_in_voxels_of_the_mask(S):
    *_, predicted, flow, mask = batch(S)
    errors = [
        abs(predicted[(b, i, *p)] - flow[(b, i, *p)]) for b, _, *p in mask.nonzero().tolist() for i in range(len(S))
    ]
    torch.testing.assert_close(vector_loss(predicted, flow, mask), torch.stack(errors).mean())
    off_by_two = vector_loss(flow + 2, flow, mask)
    torch.testing.assert_close(off_by_two, torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("S", SHAPES)
def test_consistency_loss_is_one_minus_the_mean_cosine_of_matching_voxels(S):
    b, a, flow, _, mask = batch(S)
    flow = flow.round()
    cosines = []
    for i, _, *p in mask.nonzero().tolist():
        match = [min(max(int(x + flow[(i, k, *p)]), 0), S[k] - 1) for k, x in enumerate(p)]
        x, y = b[(i, slice(None), *p)], a[(i, slice(None), *match)]
        cosines.append(x @ y / (x.norm() * y.norm()))
    torch.testing.assert_close(consistency_loss(b, a, flow, mask), 1 - torch.stack(cosines).mean())


def test_consistency_loss_of_features_that_agree_up_to_length_is_zero():
    features, *_, flow, mask = batch((6, 6))
    zero = torch.zeros_like(flow)
    assert consistency_loss(3 * features, features, zero, mask).abs() < 1e-6
    torch.testing.assert_close(consistency_loss(-features, features, zero, mask).item(), 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("S", SHAPES)
def test_an_empty_mask_gives_zero_and_zero_gradients(S, dtype):
    b, a, predicted, flow, mask = batch(S)
    b, a, predicted = (x.to(dtype).requires_grad_() for x in (b, a, predicted))
    empty = torch.zeros_like(mask)
    loss = vector_loss(predicted, flow.float(), empty) + consistency_loss(b, a, flow.float(), empty)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (b, a, predicted)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert epe(predicted, flow, empty).shape == (0,)
    assert mean_epe(predicted, flow, empty) == 0


def test_what_lies_outside_the_mask_does_not_matter_even_if_it_is_nan():
    *_, predicted, flow, mask = batch((6, 6))
    expected = vector_loss(predicted, flow, mask)
    predicted = predicted.masked_fill(~mask, torch.nan).requires_grad_()
    loss = vector_loss(predicted, flow, mask)
    assert loss == expected
    assert torch.autograd.grad(loss, predicted)[0].isfinite().all()


def test_zero_features_have_cosine_zero_and_finite_gradients():
    b, a, flow, _, mask = batch((6, 6))
    b, a = torch.zeros_like(b).requires_grad_(), a.requires_grad_()
    loss = consistency_loss(b, a, torch.zeros_like(flow), mask)
    assert loss == 1
    for gradient in torch.autograd.grad(loss, (b, a)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("S", SHAPES)
def test_gradients(S):
    b, a, predicted, flow, mask = batch(S, C=2)
    b, a, predicted = (x.requires_grad_() for x in (b, a, predicted))
    assert torch.autograd.gradcheck(lambda p: vector_loss(p, flow, mask), predicted)
    assert torch.autograd.gradcheck(lambda x, y: consistency_loss(x, y, flow, mask), (b, a))


def test_half_precision_features_are_compared_in_float32():
    b, a, flow, _, mask = batch((16, 16), C=64)
    # squares of 300 overflow in float16
    b, a, zero = (300 * b).half(), (300 * a).half(), torch.zeros_like(flow).float()
    loss = consistency_loss(b, a, zero, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, consistency_loss(b.float(), a.float(), zero, mask))


def test_epe_is_the_length_of_the_error_of_each_masked_voxel():
    flow = torch.zeros(1, 2, 1, 3)
    predicted = torch.tensor([[3.0, 0, 1], [4.0, 0, 0]]).view(1, 2, 1, 3)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    assert epe(predicted, flow, mask).tolist() == [5, 0]
    assert mean_epe(predicted, flow, mask) == 2.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), C=st.integers(2, 40), scale=st.floats(1e-2, 1e3))
def test_feature_variance_tells_spread_from_collapse(seed, C, scale):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(2, C, 40, 40, generator=generator) * scale
    assert abs(feature_variance(spread) - 1) < 0.02
    constant = torch.randn(1, C, 1, 1, generator=generator).expand(2, C, 40, 40)
    assert feature_variance(constant * scale) < 1e-3
    # lengths alone carry no direction
    assert feature_variance(constant * (1 + torch.rand(2, 1, 40, 40, generator=generator))) < 1e-3
    assert feature_variance(torch.zeros(2, C, 4, 4)) == 0
    assert feature_variance(constant + 0.3 * spread / scale) < feature_variance(constant + spread / scale)


def test_shapes_that_do_not_fit_are_named():
    b, a, predicted, flow, mask = batch((6, 6))
    with pytest.raises(ValueError, match=r"vector_loss: `predicted` must have the shape of `flow`.*\[2, 1, 6, 6\]"):
        vector_loss(predicted[:, :1], flow, mask)
    with pytest.raises(ValueError, match=r"vector_loss: `mask` must be bool \[2, 1, 6, 6\].*float32"):
        vector_loss(predicted, flow, mask.float())
    with pytest.raises(ValueError, match=r"consistency_loss: `features_b`"):
        consistency_loss(b[:, :3], a, flow, mask)
    with pytest.raises(ValueError, match=r"epe: `mask`"):
        epe(predicted, flow, mask[:, 0])


@pytest.mark.parametrize("S", [(7, 9), (4, 5, 6)])
def test_consistency_loss_is_the_same_whatever_the_order_of_memory(S):
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[len(S)]
    flow, mask = torch.randn(2, len(S), *S), torch.rand(2, 1, *S) < 0.7
    values = []
    for order in (torch.contiguous_format, last):
        generator = torch.Generator().manual_seed(0)
        b, a = (torch.randn(2, 5, *S, generator=generator).to(memory_format=order).requires_grad_() for _ in range(2))
        loss = consistency_loss(b, a, flow, mask)
        values.append([loss, *torch.autograd.grad(loss, (b, a)), feature_variance(b)])
    torch.testing.assert_close(*values)
