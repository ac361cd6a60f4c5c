"""The figure of `cover visualize`: it is drawn for 2D and 3D, and its colours and planes are what they say."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SETTINGS, volumes

from cover import pretrain, visualize
from cover.config import Config, replace
from cover.figures import figure, pca_rgb
from cover.model import build_model
from cover.views import Views

pytest.importorskip("matplotlib")


def model_and_views(*size, in_channels=1, inside=True):
    torch.manual_seed(0)
    config = replace(
        Config(), crop=size, in_channels=in_channels, channels=(4, 8), heads=(2, 1), window=3, group_channels=4
    )
    a, b = torch.randn(2, 2, in_channels, *size)
    mask = torch.full((2, 1, *size), inside)
    return build_model(config), Views(a, b, torch.randn(2, len(size), *size), mask)


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        ((12, 9), {}),
        ((8, 10, 7), {"spacing": (1.0, 1.0, 2.5)}),
        ((12, 9), {"in_channels": 3, "inside": False}),
    ],
    ids=["2D", "3D, thick slices", "colour, no match inside view a"],
)
def test_figure_is_drawn(tmp_path, size, arguments):
    spacing = arguments.pop("spacing", None)
    path = figure(*model_and_views(*size, **arguments), tmp_path / "new" / "figure.png", spacing)
    picture = pixels(path)
    assert path == tmp_path / "new" / "figure.png"
    assert min(picture.shape[:2]) > 500
    # more than a fifth is not the white of the paper
    assert (picture < 0.99).any(-1).mean() > 0.2


def test_draws_the_sample_that_is_asked_for(tmp_path):
    model, views = model_and_views(12, 9)
    second = pixels(figure(model, views, tmp_path / "second.png", sample=1))
    alone = pixels(figure(model, Views(*(x[1:] for x in views)), tmp_path / "alone.png"))
    assert np.array_equal(second, alone)


def test_visualize_draws_an_image_of_a_run(tmp_path):
    data = volumes(tmp_path / "data")
    run = pretrain(data, out=tmp_path / "run", **SETTINGS | {"steps": 1})
    path = visualize(run, data / "volume1.npy")
    assert path == tmp_path / "run" / "figures" / "volume1.png" and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no such file"):
        visualize(run, data / "volume9.npy")


@settings(max_examples=25, deadline=None)
@given(channels=st.integers(1, 6), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_colours_are_shares_of_one_shared_range(channels, sizes, seed):
    generator = np.random.default_rng(seed)
    maps = [generator.normal(size=(channels, n, 2)) for n in sizes]
    colours, share = pca_rgb(*maps)
    assert [c.shape for c in colours] == [(3, n, 2) for n in sizes]
    assert all(c.min() >= 0 and c.max() <= 1 for c in colours)
    assert 0 < share <= 1 + 1e-9 and (channels > 3 or share > 1 - 1e-9)
    # a rotation of the features changes no distances, and so at most the signs of the components
    rotation = np.linalg.qr(generator.normal(size=(channels, channels)))[0]
    rotated, _ = pca_rgb(*(np.tensordot(rotation, x, 1) for x in maps))
    for before, after in zip(colours, rotated, strict=True):
        for i in range(3):
            np.testing.assert_allclose(np.abs(before[i] - 0.5), np.abs(after[i] - 0.5), atol=1e-6)


def test_equal_features_have_equal_colours_in_both_maps_and_constant_ones_are_grey():
    x = np.random.default_rng(0).normal(size=(5, 6, 7))
    (first, second), _ = pca_rgb(x, x[:, :3])
    np.testing.assert_allclose(first[:, :3], second)
    (grey,), share = pca_rgb(np.ones((5, 6, 7)))
    assert np.array_equal(grey, np.full((3, 6, 7), 0.5)) and share == 1


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'cover-vcl\[plot\]'"):
        figure(*model_and_views(12, 9), tmp_path / "figure.png")


def test_a_figure_without_a_suffix_is_a_png_and_its_path_is_the_one_that_is_returned(tmp_path):
    path = figure(*model_and_views(12, 9), tmp_path / "figure")
    assert path == tmp_path / "figure.png" and path.is_file()
