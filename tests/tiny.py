"""The smallest run that has everything: two files of 3D blobs, a network of two levels, a second of training."""

import os
import signal

import numpy as np
import torch

from cover import checkpoint, pretrain

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


def train(data, run, settings, dies_in=None, call=1):
    """Start or resume a run, on one thread: what a process does that is to be killed.

    Args:
        dies_in: "save" or "replace": the process kills itself half way through writing a checkpoint, or when a file is
            written but has not taken its name; in the call with the number `call`.
    """
    torch.set_num_threads(1)
    calls = 0

    def dying(original):
        def function(content, file):
            nonlocal calls
            calls += 1
            if calls == call:
                if dies_in == "save":
                    file.write(b"half")
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(content, file)

        return function

    if dies_in == "save":
        torch.save = dying(torch.save)
    elif dies_in == "replace":
        checkpoint.os.replace = dying(os.replace)
    pretrain(data, out=run, resume=True, **settings)
