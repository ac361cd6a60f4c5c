"""The smallest run that has everything: files of 3D blobs, a network of two levels, a second of training."""

import os
import signal

import numpy as np
import torch

from cover import checkpoint, log
from cover.trainer import Trainer

SETTINGS = dict(
    crop=(12, 12, 8),
    channels=(4, 8),
    window=3,
    heads=(2, 1),
    group_channels=4,
    control_spacing=8.0,
    steps=6,
    batch=2,
    val_samples=4,
    val_every=0,
    log_every=1,
    checkpoint_every=2,
    device="cpu",
    check_memory=False,  # test_memory.py does: it takes longer than such a run
)


def volumes(folder, count=3, seed=0, shape=(20, 20, 14)):
    """Writes `count` smooth random images as .npy into `folder`, and returns it."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        noise = generator.normal(size=shape)
        for axis in range(len(shape)):
            noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
        np.save(folder / f"volume{i}.npy", noise.astype(np.float32))
    return folder


def as_words(settings):
    """The settings as they are typed on the command line."""
    return [f"{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in settings.items()]


def weights(run):
    return checkpoint.load(checkpoint.find(run))["model"]


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def steps(run, kind="train"):
    return [record["step"] for record in log.read(run, kind)]


class Stopping(Trainer):
    """Gets Ctrl-C in its third step."""

    def train_step(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().train_step(batch)
