"""Data loading: opening a data set for the first time, batches of crops from its cache, and two views of a batch.

The images are noise, stored as data sets store theirs: compressed 16-bit NIfTI volumes, and 8-bit PNG files.
"""

import itertools

import cv2
import nibabel
import numpy as np
import pytest
from tables import DATA

from cover import config
from cover.data import open_images
from cover.trainer import Trainer

IMAGES = 4


def pytest_generate_tests(metafunc):
    sets = DATA[metafunc.config.getoption("form")]
    metafunc.parametrize("images", sets, ids=lambda images: str(images).replace(" ", "_"))


@pytest.fixture
def folder(images, tmp_path):
    """Some files of noise, smooth enough to be compressed."""
    (tmp_path / "data").mkdir()
    for i in range(IMAGES):
        noise = np.random.default_rng(i).normal(size=images.stored).cumsum(-1)
        noise = (noise - noise.min()) / np.ptp(noise)
        if len(images.stored) == 3:
            volume = nibabel.Nifti1Image((1000 * noise).astype(np.int16), np.eye(4))
            volume.to_filename(tmp_path / "data" / f"{i}.nii.gz")
        else:
            cv2.imwrite(str(tmp_path / "data" / f"{i}.png"), (255 * noise).astype(np.uint8))
    return tmp_path / "data"


def test_opening(images, folder, tmp_path, timed):
    data = config.replace(config.Config(), **images.settings).data
    fresh = (tmp_path / f"cache{i}" for i in itertools.count())

    def call():
        opened = open_images(folder, data, None, next(fresh))
        return [opened.array(i) for i in range(len(opened))]

    timed(call, f"data {images}", "opened for the first time", "cover", suite="data", images=IMAGES)


@pytest.mark.parametrize("which", ["batch of crops", "views of a batch"])
def test_batch(images, which, folder, tmp_path, device, timed):
    settings = config.replace(config.Config(), device=device, steps=10**6, **images.settings)
    trainer = Trainer(settings, folder, tmp_path / "run")
    batches = trainer.batches()
    batch = next(batches)
    batch.pop("replaced")
    call = (lambda: next(batches)) if which == "batch of crops" else (lambda: trainer.make_views(batch))
    timed(call, f"data {images}", which, "cover", suite="data", images=settings.train.batch)
