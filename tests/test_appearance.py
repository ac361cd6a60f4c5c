"""Every change of appearance does what its name says, to each sample on its own, and leaves the rest alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cover.appearance import Appearance, gaussian_blur, patch_mask
from cover.config import AppearanceConfig
from cover.rng import Draws

NOTHING = AppearanceConfig(appearance=1.0, noise=0, blur=0, contrast=0, brightness=0, gamma=0, inpaint=0)
SHAPES = [(1, 40, 30), (2, 12, 14, 10)]  # C, *S


def draws(samples, epoch=0):
    index = torch.as_tensor(samples)
    return Draws(0, torch.full_like(index, epoch), index)


def images(shape, B=16):
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(0))


def changed(shape, B=16, **ranges):
    x = images(shape, B)
    return x, Appearance(dataclasses.replace(NOTHING, **ranges))(x, draws(range(B)), "a")


def spatial(x):
    return tuple(range(2, x.dim()))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_that_does_not_happen_leaves_every_bit_alone(shape):
    x = images(shape)
    assert torch.equal(Appearance(AppearanceConfig(appearance=0.0))(x, draws(range(16)), "a"), x)
    for never in ({"inpaint": 0.5, "patches": 0}, {}):
        assert torch.equal(changed(shape, **never)[1], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_normal_and_its_strength_differs_between_samples(shape):
    x, y = changed(shape, noise=0.5)
    strength = (y - x).flatten(1).std(1)
    assert strength.max() <= 0.55 and strength.max() > 0.4 and strength.min() < 0.15
    standard = (y - x) / strength.view(-1, *[1] * (x.dim() - 1))
    assert abs((standard**4).mean() - 3) < 0.2 and abs(standard.mean()) < 0.05
    assert abs(torch.corrcoef(standard.flatten(1)).fill_diagonal_(0)).max() < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_brightness_shifts(shape):
    x, y = changed(shape, brightness=0.5)
    shift = (y - x).flatten(1)
    assert shift.std(1).max() < 1e-6
    assert 0.3 < shift.mean(1).max() <= 0.5 and -0.5 <= shift.mean(1).min() < -0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_contrast_stretches_about_the_mean_of_each_channel(shape):
    x, y = changed(shape, contrast=0.5)
    torch.testing.assert_close(y.mean(spatial(x)), x.mean(spatial(x)), rtol=0, atol=1e-5)
    factor = y.std(spatial(x)) / x.std(spatial(x))
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert 1.3 < factor.max() <= 1.501 and 0.499 <= factor.min() < 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma_bends_intensities_and_keeps_their_range_and_order(shape):
    x, y = changed(shape, gamma=0.8)
    low, high = x.amin(spatial(x), keepdim=True), x.amax(spatial(x), keepdim=True)
    torch.testing.assert_close(y.amin(spatial(x), keepdim=True), low)
    torch.testing.assert_close(y.amax(spatial(x), keepdim=True), high)
    exponent = ((y - low) / (high - low)).log() / ((x - low) / (high - low)).log()
    exponent = exponent.flatten(1).nanmedian(1).values
    assert 1.5 < exponent.max() <= 2.23 and 0.449 <= exponent.min() < 0.67
    order = x.flatten(2).argsort(2)
    assert (y.flatten(2).gather(2, order).diff(dim=2) >= -1e-6).all()


def test_gamma_of_a_constant_image_is_finite():
    x = torch.full((4, 1, 6, 6), 2.5)
    y = Appearance(dataclasses.replace(NOTHING, gamma=1.0, contrast=0.5))(x, draws(range(4)), "a")
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("S", [(41, 43), (25, 27, 23)])
def test_blur_of_an_impulse_is_a_gaussian_of_the_sample_s_own_width(S):
    sigma = torch.tensor([0.0, 0.6, 1.3, 2.5])
    x = torch.zeros(4, 2, *S, dtype=torch.float64)
    x[(..., *(n // 2 for n in S))] = 1
    y = gaussian_blur(x, sigma, 10)
    assert torch.equal(y[0], x[0])
    for i, width in enumerate(sigma[1:].tolist(), start=1):
        expected = torch.ones((), dtype=torch.float64)
        for n in S:
            line = torch.exp(-0.5 * ((torch.arange(n).double() - n // 2) / width) ** 2)
            expected = expected[..., None] * (line / line.sum())
        # the kernel is cut off at 10 voxels, four of the largest sigma
        torch.testing.assert_close(y[i], expected.expand(2, *S), rtol=0, atol=1e-4 * expected.max().item())


def test_blur_keeps_a_constant_image_up_to_its_border():
    x = torch.full((2, 1, 5, 4), 3.0)
    torch.testing.assert_close(gaussian_blur(x, torch.tensor([1.0, 2.0]), 8), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_smooths_samples_differently(shape):
    x, y = changed(shape, blur=1.5)
    remaining = y.flatten(1).std(1) / x.flatten(1).std(1)
    assert remaining.min() < 0.4 and remaining.max() > 0.8


@settings(max_examples=40, deadline=None)
@given(S=st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 6)] * 3)), data=st.data())
def test_patches_are_boxes(S, data):
    fractions = st.lists(st.floats(0, 1), min_size=len(S), max_size=len(S))
    boxes = data.draw(st.lists(st.tuples(fractions, fractions), min_size=1, max_size=3))
    centre, width = torch.tensor(boxes).transpose(0, 1)
    mask = patch_mask(S, centre[None], width[None])
    assert mask.shape == (1, 1, *S) and mask.dtype == torch.bool
    for p in torch.ones(S).nonzero().tolist():
        point = torch.tensor([(x + 0.5) / n for x, n in zip(p, S, strict=True)])
        assert mask[(0, 0, *p)] == ((point - centre).abs() < width / 2).all(1).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_in_painting_replaces_patches_by_grain_of_the_image_s_own_mean_and_spread(shape):
    x = images(shape) * 3 + 7
    y = Appearance(dataclasses.replace(NOTHING, inpaint=0.6, patches=3))(x, draws(range(16)), "a")
    painted = x != y
    shares = painted.flatten(1).float().mean(1)
    assert 0 < shares.max() <= 3 * 0.6 ** (x.dim() - 2) and shares.unique().numel() > 12
    # all channels are painted alike
    assert torch.equal(painted, painted[:, :1].expand_as(painted))
    assert abs(y[painted].mean() - 7) < 0.3 and abs(y[painted].std() - 3) < 0.3
    assert abs(torch.corrcoef(torch.stack([x[painted], y[painted]]))[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["noise", "blur", "contrast", "brightness", "gamma", "inpaint"])
def test_each_change_happens_with_its_probability(name):
    config = dataclasses.replace(NOTHING, appearance=0.3, **{name: 0.9}, patches=20)
    x = images((1, 8, 8), B=500)
    y = Appearance(config)(x, draws(range(500)), "a")
    share = (x != y).flatten(1).any(1).float().mean()
    assert abs(share - 0.3) < 5 * 0.0205


@pytest.mark.parametrize("name", ["noise", "blur", "contrast", "brightness", "gamma", "inpaint"])
def test_each_change_differs_between_views(name):
    change, x = Appearance(dataclasses.replace(NOTHING, **{name: 0.9})), images((1, 12, 12))
    changes = torch.stack([(change(x, draws(range(16)), view) - x).flatten() for view in "ab"])
    # blur, contrast and gamma of one image have something in common whatever their amounts
    assert torch.corrcoef(changes)[0, 1].abs() < (0.1 if name == "noise" else 0.9)


@pytest.mark.parametrize("shape", SHAPES)
def test_views_and_epochs_differ_but_batches_do_not_matter(shape):
    change, x = Appearance(AppearanceConfig(appearance=1.0)), images(shape, B=5)
    y = change(x, draws(range(5)), "a")
    assert torch.equal(change(x[3:4], draws([3]), "a"), y[3:4])
    assert not torch.equal(change(x, draws(range(5)), "b"), y)
    assert not torch.equal(change(x, draws(range(5), epoch=1), "a"), y)
    assert y.isfinite().all() and y.dtype == torch.float32 and y.shape == x.shape
