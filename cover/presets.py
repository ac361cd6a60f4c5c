"""Named starting points for the settings of a run; docs/pretraining.md says where each comes from."""

import difflib

from cover.config import Config, replace

# What the paper states, plus what its summary leaves open (image sizes, batch, channels), taken from the authors' code.
_PAPER = {
    "channels": (32, 64, 128, 256, 512),
    "window": 7,
    "heads": (4, 4, 4, 1, 1),
    "group_channels": 8,
    "norm": "group",
    "nonrigid": 0.0,
    "optimiser": "sgd",
    "lr": 1e-4,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "constant",
    "clip": 1.0,
    "steps": 200_000,
    "val_every": 5000,
    "checkpoint_every": 1000,
    "log_every": 100,
}

PRESETS: dict[str, tuple[str, dict]] = {
    "default": ("every setting at its default: full-size network, 2D, AdamW, one-cycle", {}),
    "paper-2d": (
        "the paper's 2D setting, 2e5 steps",
        _PAPER | {"resize": (576, 576), "crop": (384, 384), "batch": 24},
    ),
    "paper-3d": (
        "the paper's 3D setting, 2e5 steps",
        _PAPER | {"crop": (96, 96, 96), "batch": 2, "recompute": "norms"},  # the same bits
    ),
    "authors-2d": (
        "what the authors' released 2D code does, for comparison: N = 5, Adam, vectors far beyond the reach",
        _PAPER
        | {
            "resize": (576, 576),
            "crop": (384, 384),
            "batch": 24,
            "window": 5,
            "optimiser": "adam",
            "lr": 9.4e-6,
            "rotation": 180.0,
            "scale": 0.5,
            "shear": 0.0,
            "translation": 0.1,  # 81 % of the vectors beyond the reach; in their code 82 %
            "fit_to_reach": None,
        },
    ),
    "small-2d": (
        "2D, trains within minutes on a CPU",
        {
            "resize": (112, 112),
            "crop": (96, 96),
            "channels": (8, 16, 32, 64, 128),
            "window": 5,
            "heads": (4, 4, 4, 1, 1),
            "precision": "fp32",  # so few channels are no faster in bf16
            "lr": 3e-3,
            "steps": 400,
            "batch": 4,
        },
    ),
    "small-3d": (
        "3D, trains within minutes on a CPU",
        {
            "crop": (32, 48, 32),
            "channels": (8, 16, 32, 64),
            "window": 3,
            "heads": (4, 4, 1, 1),
            "control_spacing": 16.0,
            "nonrigid": 2.0,
            "precision": "fp32",  # so few channels are no faster in bf16
            "lr": 3e-3,
            "steps": 400,
            "batch": 2,
        },
    ),
    "demo-3d": (
        "3D on the brain EPI that nibabel ships (`make demo`)",
        {
            "crop": (64, 64, 24),
            "channels": (8, 16, 32, 64),
            "window": 3,
            "heads": (4, 4, 1, 1),
            "control_spacing": 16.0,
            "nonrigid": 2.0,
            "val_fraction": 0.0,
            "precision": "fp32",  # so few channels are no faster in bf16
            "lr": 3e-3,
            "steps": 220,
            "batch": 2,
        },
    ),
}


def preset_config(name: str) -> Config:
    """The settings of the preset `name`; ValueError, with the list of presets, for one that does not exist."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config: there is no preset {name!r} (there are {', '.join(PRESETS)}){hint}")
    return replace(Config(), **PRESETS[name][1])
