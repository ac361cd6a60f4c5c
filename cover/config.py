"""Every setting of a run, as frozen dataclasses, and the presets: the one place where defaults live.

Field names are unique over all sections, so that a setting is given by its bare name: `cover pretrain ... lr=1e-3`
and `cover.pretrain(..., lr=1e-3)`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """How images are read, normalised and cropped."""

    crop: tuple[int, ...] = (224, 224)  # voxels; its length says 2D or 3D
    in_channels: int = 1  # colour images are averaged to grey when this is 1
    resize: tuple[int, ...] | None = None  # 2D: every image is resized to (H, W) before cropping
    spacing: tuple[float, ...] | None = None  # 3D: resample to this voxel size, millimetres; None: as stored
    slice_axis: int | None = None  # 2D training from the slices of volumes along this canonical axis
    volumes: str | int = "all"  # which volumes of a 4D image: "all" or an index
    normalise: str = "percentile"  # "percentile" (clip, then z-score), "zscore" or "hounsfield"
    percentiles: tuple[float, float] = (0.5, 99.5)
    hounsfield: tuple[float, float] = (-1000.0, 1000.0)
    foreground: float = 0.5  # share of crops centred on a foreground voxel
    val_fraction: float = 0.1  # share of the images held out when no manifest says which
    on_error: str = "skip"  # unreadable images: "skip" or "fail"
    cache: str | None = None  # folder of decoded volumes; None: <out>/cache
    workers: int = 0  # data-loading processes


@dataclass(frozen=True)
class DVFConfig:
    """Ranges of the random displacement vector fields; each is drawn uniformly from [-range, range]."""

    rotation: float = 20.0  # degrees, about every axis (2D: in the plane)
    scale: float = 0.15  # fraction, per axis: factors from 1 - scale to 1 + scale
    shear: float = 0.05  # fraction, per ordered pair of axes
    translation: float = 0.05  # fraction of the crop, per axis
    nonrigid: float = 4.0  # voxels, at the control points of a cubic B-spline, per axis
    control_spacing: float = 32.0  # voxels between control points
    flip: float = 0.0  # probability, per axis
    fit_to_reach: float | None = 0.97  # shrink the ranges until this share of vectors is within reach; None: do not


@dataclass(frozen=True)
class AppearanceConfig:
    """Appearance changes t(x) on z-scored images; each happens to a sample with probability `appearance`."""

    appearance: float = 0.5  # probability of each single change
    views: str = "both"  # which views are changed: "a", "b", "both" or "none"
    noise: float = 0.2  # largest standard deviation
    blur: float = 1.0  # largest Gaussian sigma, voxels
    contrast: float = 0.3  # fraction: factors from 1 - contrast to 1 + contrast
    brightness: float = 0.3  # largest shift
    gamma: float = 0.3  # exponents from exp(-gamma) to exp(gamma)
    inpaint: float = 0.25  # largest share of an axis that an in-painted patch takes
    patches: int = 4  # in-painted patches per sample


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and vector pyramid."""

    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # U-Net, fine to coarse; its length is the number of levels
    window: int | tuple[int, ...] = 7  # N, odd, in voxels of each level; or one per axis
    heads: tuple[int, ...] = (4, 4, 4, 1, 1)  # J per pyramid level, coarse to fine; shorter: only the finest levels
    group_channels: int = 8  # C, channels of one vector group
    mask_outside: bool = False  # leave keys sampled from outside view a out of the softmax


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, logging and saving."""

    steps: int = 1000
    batch: int = 4
    optimiser: str = "adamw"  # "adamw" or "sgd"
    lr: float = 1e-3
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4
    schedule: str = "onecycle"  # "onecycle" or "constant"
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    vector_weight: float = 1.0  # factor of L_vec
    consistency_weight: float = 1.0  # factor of L_con
    seed: int = 0
    device: str = "auto"  # "auto": cuda where there is one, else cpu
    log_every: int = 10  # steps
    val_every: int = 200  # steps; 0: only at the end
    checkpoint_every: int = 200  # steps
    keep: int = 2  # checkpoints kept


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    data: DataConfig = field(default_factory=DataConfig)
    dvf: DVFConfig = field(default_factory=DVFConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_SECTION_OF = {f.name: s.name for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)}
assert len(_SECTION_OF) == sum(len(dataclasses.fields(s.type)) for s in dataclasses.fields(Config)), "names clash"


def replace(config: Config, **settings: Any) -> Config:
    """A copy of `config` with settings changed by their bare names; ValueError for a name that does not exist."""
    for name, value in settings.items():
        if name not in _SECTION_OF:
            import difflib

            near = difflib.get_close_matches(name, _SECTION_OF, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config: there is no setting {name!r}{hint}")
        section = getattr(config, _SECTION_OF[name])
        value = _coerce(name, value, getattr(type(section)(), name), type(section).__annotations__[name])
        config = dataclasses.replace(config, **{_SECTION_OF[name]: dataclasses.replace(section, **{name: value})})
    return config
