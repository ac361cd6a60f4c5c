"""What is measured: the sizes of every suite, in a quick, a short and a full form.

quick: does all of it run? short: minutes. full: every size that a bar or a claim speaks of.
"""

import os
from dataclasses import dataclass

import torch

from cover.config import ModelConfig
from cover_kernels.problems import Compose, Veu, Warp

FORMS = ("quick", "short", "full")
_SHORT = [
    Veu((384, 384), 7),
    Veu((48, 48, 48), 5),
    Veu((24, 24), 7, heads=4),
    Warp((384, 384), 32),
    Warp((64, 64, 64), 32),
    Warp((96, 96, 96), 8),
    Compose((96, 96, 96)),
]
OPERATORS = {
    "quick": [
        Veu((24, 32), 7, heads=2),
        Veu((8, 10, 12), 5),
        Veu((16, 24), 5, dtype=torch.bfloat16),
        Warp((16, 32), 4),
        Warp((8, 12, 16), 3, stride=2),
        Compose((8, 12, 16)),
    ],
    "short": _SHORT,
    "full": [
        *_SHORT,
        Veu((96, 96), 7, heads=4),
        Veu((384, 384), 7, dtype=torch.bfloat16),
        Veu((384, 384), 5, channels=32),
        Veu((384, 384), 7, channels=32),
        Veu((12, 12, 12), 5, heads=4),
        Veu((48, 48, 48), 7),
        Veu((48, 48, 48), 5, channels=32),
        Veu((48, 48, 48), 7, channels=32),
        Veu((48, 48, 48), 5, dtype=torch.bfloat16),
        Veu((96, 96, 96), 5),
        Warp((384, 384), 8, stride=2),
        Warp((96, 96, 96), 8, stride=2),
        Warp((64, 64, 64), 32, dtype=torch.bfloat16),
        Compose((384, 384)),
    ],
}
# sizes that fill a GPU, in place of the full form's
ON_GPU = [
    Veu((384, 384), 7, batch=24),
    Veu((384, 384), 7, batch=24, dtype=torch.bfloat16),
    Veu((96, 96), 7, heads=4, batch=24),
    Veu((384, 384), 7, channels=32, batch=8),
    Veu((384, 384), 7, channels=32, batch=8, dtype=torch.bfloat16),
    Veu((96, 96, 96), 5, batch=2),
    Veu((96, 96, 96), 5, batch=2, dtype=torch.bfloat16),
    Veu((96, 96, 96), 5, channels=32, dtype=torch.bfloat16),
    Veu((96, 96, 96), 7),
    Warp((384, 384), 32, batch=24),
    Warp((96, 96, 96), 8, stride=2, batch=2),
    Compose((384, 384), batch=24),
    Compose((96, 96, 96), batch=2),
]


def operators(form: str, device: str):
    return ON_GPU if form == "full" and device != "cpu" else OPERATORS[form]


@dataclass(frozen=True)
class Network:
    """The model at full width: size of the crop, window, and the channels of the backbone, fine to coarse."""

    S: tuple[int, ...]
    window: int
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    batch: int = 1

    def __str__(self):
        return f"{len(self.S)}D {self.batch}x1x{'x'.join(map(str, self.S))} N={self.window}"

    @property
    def settings(self) -> dict:
        """Settings of a run, beside those that a user's would have."""
        heads = ModelConfig().heads[-len(self.channels) :]
        names = {"crop": self.S, "window": self.window, "channels": self.channels, "heads": heads}
        return names | {"batch": self.batch, "val_fraction": 0.0, "precision": "fp32"}


NETWORKS = {
    "quick": [Network((32, 32), 3, (4, 8)), Network((8, 12, 16), 3, (4, 8))],
    "short": [Network((384, 384), 7), Network((32, 32, 32), 5)],
    "full": [Network((384, 384), 7), Network((96, 96, 96), 5)],
}


@dataclass(frozen=True)
class Images:
    """A data set: the shape of a stored image, and the settings that say what is made of it."""

    stored: tuple[int, ...]
    crop: tuple[int, ...]
    resize: tuple[int, ...] | None = None
    batch: int = 2

    def __str__(self):
        shapes = ("x".join(map(str, shape)) for shape in (self.stored, self.resize, self.crop) if shape)
        return f"{len(self.stored)}D {' to '.join(shapes)} batch {self.batch}"

    @property
    def settings(self) -> dict:
        return {"crop": self.crop, "resize": self.resize, "batch": self.batch, "val_fraction": 0.0}


DATA = {
    "quick": [Images((40, 48), (16, 16), (32, 32)), Images((20, 24, 16), (16, 16, 16))],
    "short": [Images((1024, 1024), (384, 384), (576, 576), 4), Images((160, 192, 160), (96, 96, 96))],
}
DATA["full"] = DATA["short"]

# axis -> (value on the axis, problem); what is not on the axis stays as it is
_CUBES, _SQUARES = (16, 24, 32, 48, 64, 96, 128, 160), (64, 128, 256, 512, 1024, 2048)
SCALING = {
    "voxels": [
        *((n**2, Veu((n, n), 7)) for n in _SQUARES),
        *((n**3, Veu((n, n, n), 5)) for n in _CUBES),
        *((n**2, Warp((n, n), 8)) for n in _SQUARES),
        *((n**3, Warp((n, n, n), 8)) for n in _CUBES),
    ],
    "window": [
        *((n, Veu((192, 192), n)) for n in (3, 5, 7, 9, 13, 19, 27, 41)),
        *((n, Veu((48, 48, 48), n)) for n in (3, 5, 7, 9, 11)),
    ],
    "channels of a group": [
        *((c, Veu((192, 192), 7, channels=c)) for c in (1, 2, 4, 8, 16, 32, 64, 128)),
        *((c, Veu((32, 32, 32), 5, channels=c)) for c in (1, 2, 4, 8, 16, 32, 64)),
        *((c, Warp((192, 192), c)) for c in (1, 2, 4, 8, 16, 32, 64, 128)),
    ],
    "groups": [
        *((j, Veu((192, 192), 7, heads=j)) for j in (1, 2, 4, 8, 16)),
        *((j, Veu((32, 32, 32), 5, heads=j)) for j in (1, 2, 4, 8)),
    ],
    "threads": [
        (t, problem)
        for problem in (Veu((384, 384), 7), Veu((48, 48, 48), 5), Warp((64, 64, 64), 32))
        for t in sorted({1, 2, 4, 8, 16, 32, 64, os.cpu_count()})
        if t <= os.cpu_count()
    ],
}
