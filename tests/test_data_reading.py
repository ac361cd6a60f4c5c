"""Files to normalised images: formats, axis order, voxel size, intensities, and everything that can be wrong."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from cover.config import DataConfig
from cover.data import ImageError, check
from cover.data.prepare import foreground_positions, normalise, prepare, resample
from cover.data.reading import read

VOLUME = DataConfig(crop=(8, 8, 8))
PICTURE = DataConfig(crop=(8, 8))
EPI = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"


def smooth(*shape, seed=0):
    """A random image without the frequencies that JPEG drops, from 0 to 1."""
    x = np.random.default_rng(seed).random((4,) * len(shape), dtype=np.float32)
    x = resample(x[None], shape)[0]
    return (x - x.min()) / (x.max() - x.min())


def save_nifti(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


# pictures


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", "uint8"), ("png", "uint16"), ("jpg", "uint8"), ("tif", "uint8"), ("tiff", "uint16"), ("tif", "float32")],
)
def test_pictures(tmp_path, suffix, dtype, colour):
    cv2 = pytest.importorskip("cv2")
    scale = 1 if dtype == "float32" else np.iinfo(dtype).max
    channels = [smooth(24, 33, seed=k) for k in range(3 if colour else 1)]
    image = (np.stack(channels, -1) * scale).astype(dtype)
    path = tmp_path / f"x.{suffix}"
    assert cv2.imwrite(str(path), image[..., ::-1])  # opencv's order is blue, green, red
    array = read(path, PICTURE).array
    assert array.shape == (1, 3 if colour else 1, 24, 33) and array.dtype == dtype
    error = np.abs(array[0].astype(float) - np.moveaxis(image, -1, 0))
    assert error.mean() <= (0.03 * scale if suffix == "jpg" else 0)  # a JPEG has colour at half the resolution


def test_transparency_is_dropped(tmp_path):
    cv2 = pytest.importorskip("cv2")
    image = (np.stack([smooth(9, 9, seed=k) for k in range(4)], -1) * 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    np.testing.assert_array_equal(read(tmp_path / "x.png", PICTURE).array[0], np.moveaxis(image[..., 2::-1], -1, 0))


# volumes


@given(st.permutations("RAS"), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
@settings(max_examples=15, deadline=None)
def test_orientation_and_spacing_are_canonical(tmp_path_factory, axes, flips, four):
    opposite = {"R": "L", "A": "P", "S": "I"}
    codes = [opposite[axis] if flip else axis for axis, flip in zip(axes, flips, strict=True)]
    canonical = smooth(5, 6, 7)
    to_stored = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = apply_orientation(canonical, to_stored)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(to_stored, canonical.shape)
    if four:
        stored = np.stack([stored, stored + 1], -1)
    decoded = read(save_nifti(tmp_path_factory.mktemp("n") / "x.nii", stored, affine), VOLUME)
    np.testing.assert_array_equal(decoded.array[0, 0], canonical)
    assert decoded.array.shape == (2 if four else 1, 1, 5, 6, 7)
    np.testing.assert_allclose(decoded.spacing, (1, 2, 3), rtol=1e-6)


def test_volumes_of_a_4d_image():
    truth = np.moveaxis(nibabel.as_closest_canonical(nibabel.load(EPI)).get_fdata(dtype=np.float32), -1, 0)
    np.testing.assert_array_equal(read(EPI, VOLUME).array, truth[:, None])
    np.testing.assert_array_equal(read(EPI, DataConfig(crop=(8, 8, 8), volumes=1)).array, truth[None, 1:])
    np.testing.assert_array_equal(read(EPI, DataConfig(crop=(8, 8, 8), volumes="channels")).array, truth[None])
    with pytest.raises(ImageError, match="has 2 volumes; `volumes` asks for number 2"):
        read(EPI, DataConfig(crop=(8, 8, 8), volumes=2))


def test_nifti_scaling_rgb_and_units(tmp_path):
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(2.0, -7.0)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    decoded = read(tmp_path / "scaled.nii.gz", VOLUME)
    np.testing.assert_allclose(decoded.array[0, 0], 2.0 * np.arange(60).reshape(3, 4, 5) - 7.0, rtol=1e-6)
    np.testing.assert_allclose(decoded.spacing, 1e-3)
    rgb = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), dtype=np.uint8)
    save_nifti(tmp_path / "rgb.nii", rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "rgb.nii", VOLUME).array[0], np.moveaxis(rgb, -1, 0))
    rgba = np.concatenate([rgb, np.full((3, 4, 5, 1), 255, np.uint8)], axis=-1)  # transparency is dropped here too
    save_nifti(tmp_path / "rgba.nii", rgba.view([(name, "u1") for name in "RGBA"])[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "rgba.nii", VOLUME).array[0], np.moveaxis(rgb, -1, 0))


def test_radiograph_stored_as_nifti(tmp_path):
    decoded = read(save_nifti(tmp_path / "x.nii", smooth(9, 1, 7)), PICTURE)
    assert decoded.array.shape == (1, 1, 9, 7) and decoded.spacing == (1, 3)


@pytest.mark.parametrize(
    "stored", [np.asarray, np.asfortranarray, lambda x: x.astype(">f8")], ids=["C", "Fortran", "big-endian"]
)
@pytest.mark.parametrize(("shape", "config"), [((9, 8), PICTURE), ((3, 9, 8), PICTURE), ((9, 8, 7), VOLUME)])
def test_npy(tmp_path, shape, config, stored):
    x = np.random.default_rng(0).random(shape)
    np.save(tmp_path / "x.npy", stored(x))
    d = len(config.crop)
    np.testing.assert_array_equal(read(tmp_path / "x.npy", config).array, x.reshape(1, -1, *shape[-d:]))


# what is wrong with a file (bad_files.py has a corpus of them)


@pytest.mark.parametrize("volumes", ["all", 0])
def test_a_gzip_stream_with_a_flipped_bit(tmp_path, volumes):
    path, settings = tmp_path / "x.nii.gz", DataConfig(crop=(8, 8, 8), volumes=volumes)
    x = np.random.default_rng(0).integers(0, 9, (12, 12, 12, 2), dtype=np.int16)
    good = save_nifti(path, x).read_bytes()
    for bit in np.linspace(8 * 10, 8 * len(good) - 1, 40).astype(int):  # before: a time that nobody needs
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(ImageError, match=r"cannot be read: |is cut off|claims|expected"):
            read(path, settings)
    path.write_bytes(good + b"garbage")
    with pytest.raises(ImageError, match="cannot be read: BadGzipFile"):
        read(path, settings)
    plain = gzip.decompress(good)  # of two members, and filled up with zeros
    path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]) + bytes(512))
    np.testing.assert_array_equal(read(path, settings).array[0, 0], x[..., 0])


def test_a_file_that_cannot_be_prepared_is_a_problem_of_its_own(tmp_path):
    save_nifti(tmp_path / "x.nii", smooth(5, 6, 7))
    report = check(tmp_path, DataConfig(crop=(8, 8, 8), spacing=(1e-310, 1, 1)))
    assert [finding.name for finding in report.problems] == ["x.nii"]
    assert report.problems[0].what.startswith("cannot be prepared: OverflowError: ")


@pytest.mark.parametrize(
    "bad",
    [
        {"resize": (10**6, 10**6)},
        {"slice_axis": 0, "spacing": (1, 1, np.inf)},
        {"slice_axis": 0, "spacing": (1, 1, np.nan)},
        {"hounsfield": (-np.inf, 1)},
        {"hounsfield": (0, np.inf)},
    ],
    ids=str,
)
def test_settings_that_no_image_can_meet_are_refused(bad):
    with pytest.raises(ValueError, match=f"config: `{list(bad)[-1]}` must be"):
        DataConfig(crop=(8, 8), **bad)


def test_bad_volumes_of_a_good_file(tmp_path):
    x = smooth(5, 6, 7)
    save_nifti(tmp_path / "x.nii", np.stack([x, x * 0, x, x * np.nan], -1))
    report = check(tmp_path, VOLUME)
    assert report.images == 2
    assert [finding.name for finding in report.problems] == ["x.nii, volume 1", "x.nii, volume 3"]


# intensities, channels, voxel size


def config(**settings):
    return DataConfig(crop=(8,) * settings.pop("d", 2), **settings)


@given(
    st.integers(0, 2**32),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.sampled_from(["percentile", "zscore"]),
)
@settings(max_examples=30, deadline=None)
def test_z_scores_do_not_depend_on_the_scale(seed, scale, shift, kind):
    x = np.random.default_rng(seed).gamma(2.0, size=(2, 12, 13))
    y, note = prepare(x, None, config(in_channels=2, normalise=kind))
    z, _ = prepare(x * scale + shift, None, config(in_channels=2, normalise=kind))
    assert y.dtype == np.float32 and note is None
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 2)), 1, rtol=1e-4)
    # float32 holds |shift| / scale to 6e-8 of it
    np.testing.assert_allclose(y, z, atol=1e-4 + 1e-6 * abs(shift) / scale)


def test_percentiles_clip_outliers():
    x = smooth(40, 40)
    x[0, 0] = 1e6
    y, _ = prepare(x[None], None, config())
    assert y.max() < 4
    assert prepare(x[None], None, config(normalise="zscore"))[0].max() == pytest.approx(40, rel=0.01)


def test_a_sparse_image_survives_clipping():
    x = np.zeros((1, 100, 100), np.float32)
    x[0, 50, 50] = 1
    y, _ = prepare(x, None, config())
    assert np.isfinite(y).all() and y[0, 50, 50] == y.max() > y[0, 0, 0]


def test_hounsfield_window():
    x = np.array([[-2000.0, -1000.0, 0.0], [500.0, 1000.0, 3000.0]])[None]
    y, _ = prepare(x, None, config(normalise="hounsfield", hounsfield=(-1000, 1000)))
    np.testing.assert_allclose(y[0] / np.sqrt(3), [[-1, -1, 0], [0.5, 1, 1]], rtol=1e-6)
    spread = np.linspace(-160, 240, 10_000, dtype=np.float32).reshape(1, 100, 100)
    normalise(spread, config(normalise="hounsfield", hounsfield=(-160, 240)))
    assert spread.mean() == pytest.approx(0, abs=1e-4) and spread.std() == pytest.approx(1, rel=1e-3)
    with pytest.raises(ImageError, match="constant inside the Hounsfield window"):
        prepare(x, None, config(normalise="hounsfield", hounsfield=(4000, 5000)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e300])
def test_voxels_that_mean_nothing_become_background(bad):
    x = smooth(10, 10).astype(np.float64) + 5
    x[:2] = bad
    y, note = prepare(x[None], None, config(normalise="zscore"))
    assert "20.00% of its voxels" in note
    np.testing.assert_array_equal(y[0, :2], y.min())
    assert np.isfinite(y).all()


def test_channels():
    x = np.stack([smooth(9, 9, seed=k) for k in range(3)])
    np.testing.assert_allclose(
        prepare(x, None, config())[0], prepare(x.mean(0, keepdims=True), None, config())[0], atol=1e-5
    )
    three, _ = prepare(x[:1], None, config(in_channels=3))
    np.testing.assert_array_equal(three, np.repeat(three[:1], 3, 0))
    with pytest.raises(ImageError, match="has 3 channels; `in_channels` is 2"):
        prepare(x, None, config(in_channels=2))


@pytest.mark.parametrize(("shape", "to"), [((16, 24), (32, 36)), ((40, 24), (10, 8)), ((12, 18, 16), (24, 9, 16))])
def test_resampling_keeps_a_ramp_where_it_is(shape, to):
    grid = np.meshgrid(*(np.arange(n) + 0.5 for n in shape), indexing="ij")
    wanted = np.meshgrid(*((np.arange(m) + 0.5) * n / m for n, m in zip(shape, to, strict=True)), indexing="ij")
    weights = (1.0, 2.0, 3.0)[: len(shape)]
    ramp = sum(w * g for w, g in zip(weights, grid, strict=True))[None].astype(np.float32)
    inside = tuple(slice(m // 4, -(m // 4)) for m in to)
    resampled = resample(np.repeat(ramp, 2, 0), to)
    assert resampled.shape == (2, *to)
    expected = sum(w * g for w, g in zip(weights, wanted, strict=True))
    for channel in resampled:
        np.testing.assert_allclose(channel[inside], expected[inside], rtol=1e-4)


def test_resampling_does_not_alias():
    stripes = np.tile([0.0, 1.0], 32).astype(np.float32)[:63]
    volume = np.broadcast_to(stripes[:, None, None], (63, 6, 6))[None].copy()
    # every third voxel would be stripes again
    np.testing.assert_allclose(resample(volume, (21, 6, 6))[0, 2:-2], 0.5, atol=0.06)
    np.testing.assert_allclose(resample(volume[:, :, 0], (21, 6))[0, 2:-2], 0.5, atol=0.06)


def test_spacing_resamples_and_needs_a_voxel_size():
    settings = config(d=3, spacing=(1.0, 1.0, 2.0))
    y, _ = prepare(smooth(10, 11, 12)[None], (2.0, 1.0, 1.0), settings)
    assert y.shape == (1, 20, 11, 6)
    with pytest.raises(ImageError, match="voxel size is unknown"):
        prepare(smooth(10, 11, 12)[None], None, settings)
    with pytest.raises(ImageError, match="`max_voxels` allows"):
        prepare(smooth(10, 11, 12)[None], (1e6, 1e6, 1.0), settings)


def test_resize_and_slices():
    assert prepare(smooth(10, 12)[None], None, config(resize=(30, 20)))[0].shape == (1, 30, 20)
    x = smooth(5, 6, 7)[None]
    whole, _ = prepare(x, None, config(d=3))
    for axis in range(3):
        slices, _ = prepare(x, None, config(slice_axis=axis, resize=(3, 3)))
        np.testing.assert_array_equal(slices, np.moveaxis(whole, 1 + axis, 1))


@given(st.integers(0, 2**32), st.sampled_from([(2, 2), (9, 11), (3, 4, 5), (20, 20, 20)]))
@settings(max_examples=20, deadline=None)
def test_foreground_is_brighter_than_the_mean(seed, shape):
    x = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    positions = foreground_positions(x)
    assert positions.shape == (4096, len(shape))
    assert (x[0][tuple(positions.T)] > x.mean(dtype=np.float64)).all()
    bright = np.argwhere(x[0] > x.mean(dtype=np.float64))
    if len(bright) <= 4096:
        np.testing.assert_array_equal(np.unique(positions, axis=0), bright)
    # channels that cancel have no voxel above the mean: any will do
    assert len(np.unique(foreground_positions(np.concatenate([x, -x])), axis=0)) > 1
