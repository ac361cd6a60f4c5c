"""Evaluation: the figures are those of the errors, and the transforms never change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SETTINGS, volumes

from cover import evaluate, load_model, log, pretrain
from cover.config import Config, replace
from cover.data import open_images
from cover.evaluation import ErrorHistogram, device_of, held_out_keys, measure
from cover.model import Prediction
from cover.views import ViewMaker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return volumes(tmp_path_factory.mktemp("evaluate") / "data")


@pytest.fixture(scope="module")
def run(data):
    return pretrain(data, out=data.parent / "run", **SETTINGS)


@given(
    errors=st.lists(st.floats(0, 900, width=32), min_size=1, max_size=300),
    parts=st.integers(1, 4),
)
def test_the_figures_are_those_of_numpy(errors, parts):
    histogram = ErrorHistogram()
    for part in np.array_split(np.array(errors, dtype=np.float32), parts):
        histogram.add(torch.from_numpy(part))
    summary = histogram.summary()
    assert summary.epe_mean == pytest.approx(np.mean(errors), rel=1e-5)
    # half a bin of a hundredth of a voxel, and the float32 rounding of error / bin
    tolerance = 0.005 + 1e-4
    assert summary.epe_median == pytest.approx(np.percentile(errors, 50, method="inverted_cdf"), abs=tolerance)
    assert summary.epe_p95 == pytest.approx(np.percentile(errors, 95, method="inverted_cdf"), abs=tolerance)
    assert summary.within_1 == np.mean(np.array(errors) <= 1)
    assert summary.within_3 == np.mean(np.array(errors) <= 3)


def test_no_voxel_and_errors_beyond_all_bins():
    assert all(math.isnan(value) for value in vars(ErrorHistogram().summary()).values())
    histogram = ErrorHistogram()
    histogram.add(torch.tensor([5000.0, math.inf, math.nan]))
    assert histogram.summary().epe_median > 999


@given(images=st.integers(1, 50), samples=st.integers(1, 200))
def test_patches_are_spread_over_the_images(images, samples):
    keys = held_out_keys(images, samples)
    assert len(keys) == len(set(keys)) == samples
    counts = np.bincount([index for _, index in keys], minlength=images)
    assert counts.max() - counts.min() <= 1


class Oracle(torch.nn.Module):
    """Predicts the true displacement plus a constant; it is told by the maker of the views."""

    def __init__(self, offset):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offset))
        self.pyramid = type("Pyramid", (), {"reach": (100.0,) * 3})

    def forward(self, a, b):
        return Prediction(self.flow + self.offset, [], [], [])


@pytest.mark.parametrize(("offset", "error", "within_1"), [(0.0, 0.0, 1.0), (2.0, 2 * 3**0.5, 0.0)])
def test_a_known_error_is_measured(data, offset, error, within_1):
    config = replace(Config(), **SETTINGS)
    oracle = Oracle(offset)

    class Telling(ViewMaker):
        def __call__(self, batch, draws):
            views = super().__call__(batch, draws)
            oracle.flow = views.flow
            return views

    views = Telling(config.dvf, config.appearance, config.data.crop)
    result = measure(oracle, open_images(data, config.data), views, config, 5)
    assert result.model.epe_mean == pytest.approx(error, abs=1e-5)
    assert result.model.within_1 == within_1
    assert result.zero.epe_mean > 0.5
    assert result.reachable == 1
    assert result.patches == 5


def test_the_transforms_depend_neither_on_the_seed_nor_on_the_batch(run, data):
    first = evaluate(run, data)
    assert evaluate(run, data, seed=99, batch=3).zero.epe_mean == pytest.approx(first.zero.epe_mean, rel=1e-6)
    assert evaluate(run, data, seed=99, batch=3).model.epe_mean == pytest.approx(first.model.epe_mean, rel=1e-4)


def test_validation_of_a_run_is_the_same_evaluation(data, tmp_path):
    held_out = volumes(tmp_path / "held_out", 2, seed=1)
    run = pretrain(data, out=tmp_path / "run", val=held_out, **SETTINGS)
    (record,) = log.read(run, "val")
    assert record["step"] == SETTINGS["steps"]
    assert {name: record[name] for name in evaluate(run, held_out).as_record()} == evaluate(run, held_out).as_record()


def test_every_image_counts_unless_told_otherwise(run, data):
    assert evaluate(run, data, val_samples=1).patches == 3
    assert evaluate(run, data, samples=2).patches == 2


def test_ranges_can_change_but_the_network_cannot(run, data):
    still = dict(rotation=0, scale=0, shear=0, nonrigid=0, translation=0)
    assert evaluate(run, data, **still).zero.epe_mean == 0
    assert evaluate(run, data, crop="10,9,8").voxels > 0
    for change in (dict(window=5), dict(in_channels=3)):
        with pytest.raises(ValueError, match="settings of the trained network"):
            evaluate(run, data, **change)
    with pytest.raises(ValueError, match="`crop` must have 3 axes"):
        evaluate(run, data, crop=(8, 8))


def test_the_table_has_all_figures(run, data):
    result = evaluate(run, data)
    table = str(result).splitlines()
    assert [row.split("  ")[0].strip() for row in table[1:3]] == ["COVER", "predicting zero"]
    assert f"{result.model.epe_p95:.2f}" in table[1]
    assert f"{result.zero.within_3:.1%}" in table[2]


def test_measuring_leaves_the_model_as_it_was(run, data):
    model, config = load_model(run)
    model.train()
    views = ViewMaker(config.dvf, config.appearance, config.data.crop)
    measure(model, open_images(data, config.data), views, config, 2)
    assert model.training


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="`device` 'abacus' cannot be used"):
        device_of(replace(Config(), device="abacus"))
    assert device_of(replace(Config(), device="cpu")).type == "cpu"
