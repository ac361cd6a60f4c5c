"""The fields are what their settings say, view b shows what the field says, and the ranges fit the pyramid's reach."""

import dataclasses
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cover.config import AppearanceConfig, DVFConfig
from cover.dvf import RandomDVF
from cover.rng import Draws
from cover.views import ViewMaker, fit_to_reach, reachable_fraction, sample
from cover_kernels import use_backend, warp

STILL = DVFConfig(rotation=0, scale=0, shear=0, translation=0, nonrigid=0, flip=0)
PLAIN = AppearanceConfig(views="none")
CROPS = [(12, 17), (7, 10, 8)]

crops = st.one_of(st.tuples(*[st.integers(1, 14)] * 2), st.tuples(*[st.integers(1, 9)] * 3))
dvfs = st.builds(
    DVFConfig,
    rotation=st.floats(0, 180),
    scale=st.floats(0, 0.9),
    shear=st.floats(0, 0.45),
    translation=st.floats(0, 1),
    nonrigid=st.floats(0, 5),
    control_spacing=st.floats(2, 40),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
)


def draws(samples, epoch=0, seed=0):
    index = torch.as_tensor(samples)
    return Draws(seed, torch.full_like(index, epoch), index)


def grid(S):
    return torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in S], indexing="ij"))


def make_batch(maker, B=2, C=1, outside=0):
    """Random patches whose outermost `outside` voxels lie outside the real image."""
    shape = [size + 2 * m for size, m in zip(maker.crop, maker.margin, strict=True)]
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([[outside, n - 1 - outside] for n in shape], dtype=torch.float32)
    return {"image": torch.randn(B, C, *shape, generator=generator), "extent": extent.expand(B, -1, -1)}


def centre(maker, image):
    return image[(..., *(slice(m, m + size) for m, size in zip(maker.margin, maker.crop, strict=True)))]


# ---- fields


@pytest.mark.parametrize("crop", CROPS)
def test_zero_ranges_give_the_identity_bit_for_bit(crop):
    maker = ViewMaker(STILL, PLAIN, crop)
    batch = make_batch(maker, C=2)
    views = maker(batch, draws(range(2)))
    assert maker.margin == (0,) * len(crop)
    assert torch.equal(views.flow, torch.zeros(2, len(crop), *crop))
    assert torch.equal(views.a, batch["image"]) and torch.equal(views.b, batch["image"])
    assert views.mask.all()


@pytest.mark.parametrize("crop", CROPS)
def test_rotation_turns_about_the_centre_by_at_most_its_range(crop):
    dvf = RandomDVF(dataclasses.replace(STILL, rotation=30.0), crop)
    from_centre = grid(crop) - (torch.tensor(crop).view(-1, *[1] * len(crop)) - 1) / 2
    turned = from_centre + dvf(draws(range(64)))
    lengths = from_centre.norm(dim=0).expand(64, *crop)
    torch.testing.assert_close(turned.norm(dim=1), lengths, rtol=1e-5, atol=1e-5)
    cosine = (turned * from_centre).sum(1) / lengths.clamp(min=1e-6).square()
    largest = torch.where(lengths > 0, cosine, 1).flatten(1).amin(1).acos().rad2deg()
    assert largest.max() <= 30.01 and largest.max() > 25 and largest.min() < 15
    corners = (turned[(..., *[0] * len(crop))] - turned[(..., *[-1] * len(crop))]).norm(dim=1)
    torch.testing.assert_close(corners, torch.tensor(crop).sub(1).float().norm().expand(64))


@pytest.mark.parametrize("crop", CROPS)
def test_scale_stretches_every_axis_on_its_own(crop):
    psi = RandomDVF(dataclasses.replace(STILL, scale=0.2), crop)(draws(range(64)))
    slopes = []
    for i in range(len(crop)):
        slope = psi[:, i].diff(dim=i + 1)
        torch.testing.assert_close(slope.flatten(1).std(1), torch.zeros(64), atol=1e-5, rtol=0)
        slopes.append(slope.flatten(1).mean(1))
    slopes = torch.stack(slopes)
    assert slopes.abs().max() <= 0.2 and slopes.max() > 0.15 and slopes.min() < -0.15
    assert torch.corrcoef(slopes).fill_diagonal_(0).abs().max() < 0.5


@pytest.mark.parametrize("crop", CROPS)
def test_shear_moves_an_axis_in_proportion_to_the_others(crop):
    psi = RandomDVF(dataclasses.replace(STILL, shear=0.3), crop)(draws(range(64)))
    for i, j in product(range(len(crop)), repeat=2):
        slope = psi[:, i].diff(dim=j + 1).flatten(1).mean(1)
        assert (slope.abs().max() < 1e-6) if i == j else (0.2 < slope.abs().max() <= 0.3)


@pytest.mark.parametrize("crop", CROPS)
def test_translation_is_a_fraction_of_the_crop(crop):
    psi = RandomDVF(dataclasses.replace(STILL, translation=0.25), crop)(draws(range(64)))
    shift = psi.flatten(2)
    assert torch.equal(shift, shift[:, :, :1].expand_as(shift))
    limit = 0.25 * torch.tensor(crop)
    largest = shift[..., 0].abs().amax(0)
    assert (largest <= limit).all() and (largest > 0.9 * limit).all()


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("spacing", [3.0, 4.7, 50.0])
def test_nonrigid_fields_are_cubic_b_splines_of_their_control_points(crop, spacing):
    config = dataclasses.replace(STILL, nonrigid=3.0, control_spacing=spacing)
    source = draws(range(2))
    psi = RandomDVF(config, crop)(source)
    knots = [int((size - 1) // spacing) + 4 for size in crop]
    control = 3 * source.uniform("nonrigid", len(crop), *knots, low=-1).double()

    def beta(x):
        x = abs(x)
        return 2 / 3 - x**2 + x**3 / 2 if x < 1 else max(2 - x, 0) ** 3 / 6

    for p in [(0,) * len(crop), tuple(n - 1 for n in crop), (5, 9, 2)[: len(crop)]]:
        expected = 0
        for k in product(*map(range, knots)):
            weight = math.prod(beta(x / spacing - (i - 1)) for x, i in zip(p, k, strict=True))
            expected = expected + weight * control[(..., *k)]
        torch.testing.assert_close(psi[(..., *p)], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", CROPS)
def test_flips_alone_mirror_the_crop_bit_for_bit(crop):
    maker = ViewMaker(dataclasses.replace(STILL, flip=1.0), PLAIN, crop)
    batch = make_batch(maker)
    views = maker(batch, draws(range(2)))
    assert torch.equal(views.b, batch["image"].flip(tuple(range(2, 2 + len(crop)))))
    assert views.mask.all()
    half = RandomDVF(dataclasses.replace(STILL, flip=0.5), crop)(draws(range(400)))
    shares = (half.flatten(2).abs().amax(2) > 0).float().mean(0)
    assert ((shares - 0.5).abs() < 5 * 0.025).all()


@settings(max_examples=30, deadline=None)
@given(crop=crops, config=dvfs)
def test_a_flip_composes_with_the_other_changes(crop, config):
    """Sampling with flips is sampling the mirrored image without: F moves to the image, translations aside."""
    straight, flipped = (
        RandomDVF(dataclasses.replace(config, translation=0.0, flip=flip), crop)(draws([3])) for flip in (0.0, 1.0)
    )
    last = (torch.tensor(crop) - 1).view(-1, *[1] * len(crop))
    torch.testing.assert_close(grid(crop) + flipped, last - (grid(crop) + straight), rtol=0, atol=1e-4)


@pytest.mark.parametrize("crop", CROPS)
def test_the_composition_is_the_affine_map_after_the_nonrigid_one(crop):
    """T(p) = A (p + u(p) - c) + c + t, A and t being read from the field without u."""
    config = DVFConfig(rotation=40, scale=0.3, shear=0.2, translation=0.2, nonrigid=0, flip=0.5)
    source = draws(range(5))
    c = (torch.tensor(crop).view(1, -1, *[1] * len(crop)) - 1) / 2
    affine = grid(crop) + RandomDVF(config, crop)(source) - c
    matrix = torch.stack([affine.diff(dim=i + 2).flatten(2)[:, :, 0] for i in range(len(crop))], 2)
    shift = affine.mean(tuple(range(2, 2 + len(crop))), keepdim=True)
    u = RandomDVF(dataclasses.replace(STILL, nonrigid=2.0, control_spacing=config.control_spacing), crop)(source)
    expected = torch.einsum("bij,bj...->bi...", matrix, grid(crop) + u - c) + shift + c - grid(crop)
    psi = RandomDVF(dataclasses.replace(config, nonrigid=2.0), crop)(source)
    torch.testing.assert_close(psi, expected, rtol=0, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(crop=crops, config=dvfs, seed=st.integers(0, 2**40))
def test_no_draw_needs_more_context_than_the_margin(crop, config, seed):
    dvf = RandomDVF(config, crop)
    position = grid(crop) + dvf(draws(range(64), seed=seed))
    margin = torch.tensor(dvf.margin).view(-1, *[1] * len(crop))
    last = torch.tensor(crop).view(-1, *[1] * len(crop)) - 1
    # positions are rounded to float32
    assert (position >= -margin - 1e-4).all() and (position <= last + margin + 1e-4).all()


@pytest.mark.parametrize("crop", [(384, 384), (96, 96, 96)])
def test_the_margin_is_not_wasteful(crop):
    """Single changes come within two voxels of the margin (four where many control points must agree)."""
    for name, value in (("scale", 0.2), ("shear", 0.1), ("translation", 0.1), ("nonrigid", 5.0), ("rotation", 15.0)):
        dvf = RandomDVF(dataclasses.replace(STILL, **{name: value}), crop)
        axes = [torch.tensor([0.0, size - 1]) for size in crop]
        corners = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        source = draws(range(4000))
        excess = -(corners + dvf(source, axes)).amin().item()
        assert 0 < dvf.margin[0] - excess < (4 if name == "nonrigid" else 2), name


def test_the_margin_holds_where_scale_and_translation_add_to_a_nonrigid_field():
    """On a single voxel the spline is all that moves, and many draws come near to what it can do."""
    config = dataclasses.replace(STILL, nonrigid=5.0, scale=0.9, translation=1.0)
    dvf = RandomDVF(config, (1, 1))
    assert dvf.margin == (11, 11)  # 5 * 1.9 + 1
    assert 7.5 < dvf(draws(range(50_000))).abs().max() <= 10.5


def test_a_shear_that_could_flatten_the_image_is_refused():
    RandomDVF(dataclasses.replace(STILL, shear=0.9), (8, 8))
    with pytest.raises(ValueError, match=r"`shear` must be below 0\.5 in 3D.*got 0\.9"):
        RandomDVF(dataclasses.replace(STILL, shear=0.9), (8, 8, 8))
    with pytest.raises(ValueError, match=r"`crop` must be 2 or 3 positive sizes, got \(8,\)"):
        RandomDVF(STILL, (8,))


# ---- sampling and the mask


@settings(max_examples=25, deadline=None)
@given(crop=crops, config=dvfs, C=st.integers(1, 3))
def test_view_b_is_the_patch_warped_by_the_field(crop, config, C):
    maker = ViewMaker(config, PLAIN, crop)
    batch = make_batch(maker, C=C)
    views = maker(batch, draws(range(2)))
    assert torch.equal(views.a, centre(maker, batch["image"]))
    flow = torch.zeros(2, len(crop), *batch["image"].shape[2:])
    centre(maker, flow).copy_(views.flow)
    with use_backend("reference"):
        expected = centre(maker, warp(batch["image"].double(), flow.double()))
    # positions carry the rounding of float32: 1e-5 of a voxel times the contrast of neighbouring noise
    torch.testing.assert_close(views.b.double(), expected, rtol=0, atol=3e-4)


def test_sampling_reads_whole_positions_bit_for_bit_and_repeats_the_border():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[0, 3, 2, -2, 9], [4, 0, 3, 1, 9]]).float().view(1, 2, 1, 5).expand(2, -1, -1, -1)
    expected = x[:, :, [0, 3, 2, 0, 3], [4, 0, 3, 1, 4]].unsqueeze(2)
    assert torch.equal(sample(x, position), expected)


@settings(max_examples=40, deadline=None)
@given(crop=crops, config=dvfs, outside=st.integers(0, 12))
def test_the_mask_marks_matches_inside_view_a_and_the_real_image(crop, config, outside):
    maker = ViewMaker(config, PLAIN, crop)
    batch = make_batch(maker, outside=outside)
    views = maker(batch, draws(range(2)))
    expected = torch.ones_like(views.mask)
    for i, (size, m) in enumerate(zip(crop, maker.margin, strict=True)):
        match = (grid(crop) + views.flow)[:, i : i + 1]
        expected &= (match >= 0) & (match <= size - 1)
        expected &= (match >= outside - m) & (match <= size + m - 1 - outside)
    assert torch.equal(views.mask, expected)


@pytest.mark.parametrize("crop", CROPS)
def test_no_voxel_of_the_mask_shows_what_lies_outside_the_image(crop):
    maker = ViewMaker(DVFConfig(translation=0.3), PLAIN, crop)
    batch = make_batch(maker, outside=maker.margin[0] + 2)
    outside = torch.ones_like(batch["image"], dtype=torch.bool)
    outside[(..., *(slice(maker.margin[0] + 2, n - maker.margin[0] - 2) for n in outside.shape[2:]))] = False
    views = maker(batch, draws(range(2)))
    other = maker({**batch, "image": batch["image"].masked_fill(outside, 1e9)}, draws(range(2)))
    assert views.mask.any() and not torch.equal(views.b, other.b)
    assert torch.equal(views.b[views.mask], other.b[views.mask])


@pytest.mark.parametrize("crop", CROPS)
def test_a_sample_is_the_same_in_every_batch(crop):
    maker = ViewMaker(DVFConfig(flip=0.5), AppearanceConfig(), crop)
    batch = make_batch(maker, B=5)
    together = maker(batch, draws([4, 1, 7, 0, 2], epoch=3))
    alone = maker({name: x[2:3] for name, x in batch.items()}, draws([7], epoch=3))
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one, many[2:3])
    other = maker({name: x[2:3] for name, x in batch.items()}, draws([7], epoch=4))
    assert not torch.equal(other.flow, alone.flow) and not torch.equal(other.a, alone.a)


@pytest.mark.parametrize(("views", "changed"), [("a", "a"), ("b", "b"), ("both", "ab"), ("none", "")])
def test_appearance_changes_the_views_that_were_chosen(views, changed):
    appearance = AppearanceConfig(appearance=1.0, views=views)
    maker = ViewMaker(DVFConfig(), appearance, (12, 12))
    plain = ViewMaker(DVFConfig(), PLAIN, (12, 12))
    batch = make_batch(maker)
    result, expected = maker(batch, draws(range(2))), plain(batch, draws(range(2)))
    for name in "ab":
        same = torch.equal(getattr(result, name), getattr(expected, name))
        assert same != (name in changed)


def test_a_batch_that_does_not_fit_is_refused():
    maker = ViewMaker(DVFConfig(), PLAIN, (12, 12))
    batch = make_batch(maker)
    with pytest.raises(ValueError, match=r"ViewMaker: `draws` must be those of the 2 samples of `image`, got 3"):
        maker(batch, draws(range(3)))
    with pytest.raises(ValueError, match=r"ViewMaker: `image` must be .*got \[2, 1, 12, 12\]"):
        maker({**batch, "image": torch.zeros(2, 1, 12, 12)}, draws(range(2)))


# ---- reach


def test_reachable_fraction_counts_the_mask_per_axis():
    flow = torch.tensor([[3.0, -3.1, 0.0, -3.0], [-2.0, 0.0, 2.1, 5.0]]).view(1, 2, 1, 4)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    assert reachable_fraction(flow, mask, (3, 2)).item() == pytest.approx(1 / 3)
    assert reachable_fraction(flow, mask, (3.1, 2.1)) == 1
    assert reachable_fraction(flow, torch.zeros_like(mask), (3, 2)) == 1


def measured(config, crop, reach, seed=1, samples=64):
    """Share within reach of other fields than those that the ranges were fitted on."""
    step = [max(1, size // 24) for size in crop]
    axes = [torch.arange(0, size, s, dtype=torch.float32) for size, s in zip(crop, step, strict=True)]
    flow = RandomDVF(config, crop)(draws(range(samples), seed=seed), axes)
    position = flow + torch.stack(torch.meshgrid(*axes, indexing="ij"))
    last = torch.tensor(crop).view(-1, *[1] * len(crop)) - 1
    mask = ((position >= 0) & (position <= last)).all(1, keepdim=True)
    return reachable_fraction(flow, mask, reach).item()


PYRAMIDS = {  # r * sum of the strides
    "2d-384": ((384, 384), (93.0,) * 2),
    "2d-224": ((224, 224), (93.0,) * 2),
    "3d-small": ((32, 48, 32), (15.0,) * 3),
    "3d-96": ((96, 96, 96), (62.0,) * 3),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_the_defaults_keep_95_percent_of_the_vectors_within_reach(name):
    crop, reach = PYRAMIDS[name]
    fitted = fit_to_reach(DVFConfig(), crop, reach)
    assert measured(fitted, crop, reach) > 0.95
    # they are not shrunk to nothing either
    assert fitted.rotation >= 10


@pytest.mark.parametrize("name", PYRAMIDS)
def test_ranges_far_beyond_the_reach_are_shrunk_to_it_and_no_further(name):
    crop, reach = PYRAMIDS[name]
    wild = DVFConfig(rotation=90, scale=0.5, shear=0.2, translation=0.5, nonrigid=30)
    assert measured(wild, crop, reach) < 0.9
    fitted = fit_to_reach(wild, crop, reach)
    assert 0.95 < measured(fitted, crop, reach) < 0.99
    factor = fitted.rotation / wild.rotation
    for setting in ("scale", "shear", "translation", "nonrigid"):
        assert getattr(fitted, setting) == pytest.approx(factor * getattr(wild, setting))
    assert (fitted.control_spacing, fitted.flip) == (wild.control_spacing, wild.flip)
    assert fit_to_reach(wild, crop, reach) == fitted


def test_the_narrowest_axis_of_the_reach_counts():
    wild = DVFConfig(rotation=45, translation=0.2)
    wide, narrow = (fit_to_reach(wild, (64, 64), reach) for reach in ((20.0, 20.0), (20.0, 5.0)))
    assert narrow.rotation < 0.5 * wide.rotation


def test_ranges_that_fit_or_need_not_fit_are_left_alone():
    assert fit_to_reach(DVFConfig(), (224, 224), (93.0, 93.0)) == DVFConfig()
    free = DVFConfig(rotation=180, fit_to_reach=None)
    assert fit_to_reach(free, (64, 64), (3.0, 3.0)) is free


def test_flips_beyond_the_reach_are_refused():
    with pytest.raises(ValueError, match=r"fit_to_reach: .*`flip` is 0\.5.*Set flip to 0"):
        fit_to_reach(DVFConfig(flip=0.5), (64, 64), (15.0, 15.0))
