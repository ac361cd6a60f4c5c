"""Every setting of a run, as frozen dataclasses: the one place where defaults live.

Field names are unique over all sections, so that a setting is given by its bare name: `cover pretrain ... lr=1e-3`
and `cover.pretrain(..., lr=1e-3)`. A section checks its values when it is made. The comment behind a setting is what
`cover presets` prints beside it.
"""

import ast
import dataclasses
import difflib
import math
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin


def _check(section: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """ValueError for the first setting whose rule (does it hold, what is expected) does not hold."""
    for name, (holds, expected) in rules.items():
        if not holds:
            raise ValueError(f"config: `{name}` must be {expected}, got {getattr(section, name)!r}")


def _one_of(value: Any, *choices: str) -> tuple[bool, str]:
    return value in choices, "one of " + ", ".join(choices)


def _share(value: float) -> tuple[bool, str]:
    return 0 <= value <= 1, "from 0 to 1"


def _at_least(low: float, *values: float) -> tuple[bool, str]:
    return all(low <= value < math.inf for value in values), f"at least {low}"


def _positive(*values: float) -> tuple[bool, str]:
    return len(values) > 0 and all(0 < value < math.inf for value in values), "above 0"


@dataclass(frozen=True)
class DataConfig:
    """How images are read, normalised and cropped."""

    crop: tuple[int, ...] = (224, 224)  # voxels; its length says 2D or 3D
    in_channels: int = 1  # colour images are averaged to grey when this is 1
    resize: tuple[int, ...] | None = None  # 2D: every image is resized to (H, W) before cropping
    spacing: tuple[float, ...] | None = None  # 3D: resample to this voxel size, millimetres; None: as stored
    slice_axis: int | None = None  # 2D training from the slices of volumes along this canonical axis
    volumes: str | int = "all"  # which volumes of a 4D image: "all", an index, or "channels": one image of them all
    max_voxels: int = 2**28  # a file that claims more is not read
    normalise: str = "percentile"  # "percentile" (clip, then z-score), "zscore" or "hounsfield"
    percentiles: tuple[float, float] = (0.5, 99.5)  # of each image, clipped to; normalise=percentile only
    hounsfield: tuple[float, float] = (-1000.0, 1000.0)  # window, low and high; normalise=hounsfield only
    foreground: float = 0.5  # share of crops centred on a foreground voxel
    val_fraction: float = 0.1  # share of the images held out when no manifest says which
    on_error: str = "skip"  # unreadable images: "skip" or "fail"
    cache: str | None = None  # folder of decoded volumes; None: <out>/cache
    store: str = "npy"  # how they are kept: "npy", or "blosc2": compressed in chunks, needs cover-vcl[store]
    workers: int = 0  # data-loading processes

    def __post_init__(self):
        d = len(self.crop)
        _check(
            self,
            {
                "crop": (
                    d in (2, 3) and min(self.crop) > 0 and math.prod(self.crop) <= self.max_voxels,
                    "2 or 3 voxel counts above 0, together no more than `max_voxels`",
                ),
                "in_channels": _at_least(1, self.in_channels),
                "resize": (
                    self.resize is None
                    or (
                        d == 2
                        and len(self.resize) == 2
                        and min(self.resize) > 0
                        and math.prod(self.resize) <= self.max_voxels
                    ),
                    "H,W above 0, no more than `max_voxels` together, beside a 2D `crop`",
                ),
                "spacing": (
                    self.spacing is None
                    or (
                        len(self.spacing) == 3
                        and _positive(*self.spacing)[0]
                        and (d == 3 or self.slice_axis is not None)
                    ),
                    "three finite voxel sizes above 0, millimetres, beside a 3D `crop` or a `slice_axis`",
                ),
                "slice_axis": (
                    self.slice_axis is None or (d == 2 and self.slice_axis in (0, 1, 2)),
                    "0, 1 or 2, beside a 2D `crop`",
                ),
                "volumes": (
                    self.volumes in ("all", "channels") or (isinstance(self.volumes, int) and self.volumes >= 0),
                    "all, channels or an index",
                ),
                "max_voxels": _at_least(1, self.max_voxels),
                "normalise": _one_of(self.normalise, "percentile", "zscore", "hounsfield"),
                "percentiles": (0 <= self.percentiles[0] < self.percentiles[1] <= 100, "low,high within 0 to 100"),
                "hounsfield": (0 < self.hounsfield[1] - self.hounsfield[0] < math.inf, "low,high, both finite"),
                "foreground": _share(self.foreground),
                "val_fraction": (0 <= self.val_fraction < 1, "at least 0 and below 1"),
                "on_error": _one_of(self.on_error, "skip", "fail"),
                "store": _one_of(self.store, "npy", "blosc2"),
                "workers": _at_least(0, self.workers),
            },
        )


@dataclass(frozen=True)
class DVFConfig:
    """Ranges of the random displacement vector fields; each is drawn uniformly from [-range, range]."""

    rotation: float = 20.0  # degrees, in the plane; 3D: about an axis of any direction
    scale: float = 0.15  # fraction, per axis: factors from 1 - scale to 1 + scale
    shear: float = 0.05  # fraction, per ordered pair of axes
    translation: float = 0.05  # fraction of the crop, per axis
    nonrigid: float = 4.0  # voxels, at the control points of a cubic B-spline, per axis
    control_spacing: float = 32.0  # voxels between control points
    flip: float = 0.0  # probability, per axis
    fit_to_reach: float | None = 0.97  # shrink the ranges until this share of vectors is within reach; None: do not

    def __post_init__(self):
        _check(
            self,
            {
                "rotation": (0 <= self.rotation <= 180, "from 0 to 180 degrees"),
                "scale": (0 <= self.scale < 1, "at least 0 and below 1"),
                "shear": _at_least(0, self.shear),
                "translation": _share(self.translation),
                "nonrigid": (0 <= self.nonrigid <= 1000, "from 0 to 1000 voxels"),
                "control_spacing": _at_least(1, self.control_spacing),
                "flip": _share(self.flip),
                "fit_to_reach": (
                    self.fit_to_reach is None or 0 < self.fit_to_reach < 1,
                    "between 0 and 1, or none",
                ),
            },
        )


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

    def __post_init__(self):
        _check(
            self,
            {
                "appearance": _share(self.appearance),
                "views": _one_of(self.views, "a", "b", "both", "none"),
                "noise": _at_least(0, self.noise),
                "blur": (0 <= self.blur <= 100, "from 0 to 100 voxels"),
                "contrast": _share(self.contrast),
                "brightness": _at_least(0, self.brightness),
                "gamma": _at_least(0, self.gamma),
                "inpaint": _share(self.inpaint),
                "patches": _at_least(0, self.patches),
            },
        )


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and vector pyramid."""

    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # U-Net, fine to coarse; its length is the number of levels
    window: int | tuple[int, ...] = 7  # N, odd, in voxels of each level; or one per axis
    heads: tuple[int, ...] = (4, 4, 4, 1, 1)  # J per pyramid level, coarse to fine; shorter: only the finest levels
    group_channels: int = 8  # C, channels of one vector group
    norm: str = "unit"  # of the projected features: "unit" (length of each group at each voxel) or "group" (GroupNorm)
    mask_outside: bool = False  # leave keys sampled from outside view a, its padding, out of the softmax

    def __post_init__(self):
        window = (self.window,) if isinstance(self.window, int) else self.window
        _check(
            self,
            {
                "channels": _positive(*self.channels),
                "window": (len(window) > 0 and all(n > 0 and n % 2 for n in window), "odd, or one odd width per axis"),
                "heads": (
                    0 < len(self.heads) <= len(self.channels) and min(self.heads) > 0,
                    f"1 to {len(self.channels)} counts above 0, one per pyramid level, no more than `channels`",
                ),
                "group_channels": _at_least(1, self.group_channels),
                "norm": _one_of(self.norm, "unit", "group"),
            },
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, validation, logging and saving."""

    steps: int = 1000  # of the optimiser
    batch: int = 4  # images per step, of each process
    accumulate: int = 1  # parts that go through the network one after the other; the step is the same up to rounding
    precision: str = "auto"  # autocast of network and losses: "fp32", "bf16", "fp16"; "auto": bf16 on CPUs with it
    recompute: str = "off"  # less memory, more time: "norms" of the backbone, its "stages", or "all": view by view too
    compile: str = "off"  # torch.compile, within the first step: of the "backbone", or of the "step", losses included
    shard: bool = False  # several processes: each holds a share of weights, gradients and optimiser's state (FSDP2)
    optimiser: str = "adamw"  # "adamw", "adam" (weight decay inside the gradient) or "sgd"
    lr: float = 1e-3  # largest learning rate
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4  # how strongly weights are drawn to zero
    schedule: str = "onecycle"  # "onecycle" (linear warm-up, then cosine to zero) or "constant"
    warmup: float = 0.1  # share of the steps; onecycle only
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    vector_weight: float = 1.0  # factor of L_vec
    consistency_weight: float = 1.0  # factor of L_con
    seed: int = 0  # of weights, order, crops and views
    device: str = "auto"  # "auto": cuda where there is one, else cpu
    check_memory: bool = True  # predict the peak of a step before training starts, and refuse what does not fit
    tensorboard: bool = False  # also write the metrics for TensorBoard
    log_every: int = 10  # steps between lines in the log; metrics.jsonl has every step
    val_every: int = 200  # steps; 0: only at the end
    val_samples: int = 64  # held-out patches of a validation, spread over the images
    checkpoint_every: int = 200  # steps
    keep: int = 2  # last checkpoints kept
    keep_every: int = 0  # steps; the checkpoints of their multiples are kept for good; 0: none

    def __post_init__(self):
        _check(
            self,
            {
                "steps": _at_least(1, self.steps),
                "batch": _at_least(1, self.batch),
                "accumulate": (
                    self.accumulate >= 1 and self.batch % self.accumulate == 0,
                    f"a divisor of `batch`, {self.batch}",
                ),
                "precision": _one_of(self.precision, "auto", "fp32", "bf16", "fp16"),
                "recompute": _one_of(self.recompute, "off", "norms", "stages", "all"),
                "compile": _one_of(self.compile, "off", "backbone", "step"),
                "optimiser": _one_of(self.optimiser, "adamw", "adam", "sgd"),
                "lr": (0 < self.lr <= 1e6, "above 0 and at most 1e6"),
                "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
                "weight_decay": _at_least(0, self.weight_decay),
                "schedule": _one_of(self.schedule, "onecycle", "constant"),
                "warmup": _share(self.warmup),
                "clip": _at_least(0, self.clip),
                "vector_weight": _at_least(0, self.vector_weight),
                "consistency_weight": _at_least(0, self.consistency_weight),
                "log_every": _at_least(1, self.log_every),
                "val_every": _at_least(0, self.val_every),
                "val_samples": _at_least(1, self.val_samples),
                "checkpoint_every": _at_least(1, self.checkpoint_every),
                "keep": _at_least(1, self.keep),
                "keep_every": _at_least(0, self.keep_every),
                "seed": (-(2**63) <= self.seed < 2**63, "a 64-bit int"),
            },
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    data: DataConfig = field(default_factory=DataConfig)
    dvf: DVFConfig = field(default_factory=DVFConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        d, window = len(self.data.crop), self.model.window
        if not isinstance(window, int) and len(window) != d:
            raise ValueError(f"config: `window` must have one width per axis of the {d}D `crop`, got {window!r}")


_SECTION_OF = {f.name: s.name for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)}
_TYPES = {f.name: f.type for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)}
assert len(_SECTION_OF) == sum(len(dataclasses.fields(s.type)) for s in dataclasses.fields(Config)), "names clash"


def replace(config: Config, **settings: Any) -> Config:
    """A copy of `config` with settings changed by their bare names.

    A value is of the setting's type or text that says it, as on the command line: "1e-3", "96,96,96",
    "(96, 96, 96)", "true", "none". Raises ValueError, naming the setting, for one that does not exist and for a value
    that does not fit.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name not in _SECTION_OF:
            near = difflib.get_close_matches(name, _SECTION_OF, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config: there is no setting {name!r}{hint}")
        changes.setdefault(_SECTION_OF[name], {})[name] = _coerce(name, value)
    sections = {section: dataclasses.replace(getattr(config, section), **new) for section, new in changes.items()}
    return dataclasses.replace(config, **sections)


def flatten(config: Config) -> dict[str, Any]:
    """All settings by their bare names; `replace(Config(), **flatten(config))` is `config`."""
    return {name: getattr(getattr(config, section), name) for name, section in _SECTION_OF.items()}


def meanings() -> dict[str, str]:
    """What each setting means: the comment behind it in this file."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings by section, of types that JSON knows (tuples as lists)."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        for section, settings in dataclasses.asdict(config).items()
    }


def from_dict(sections: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`; a setting that is missing takes its default. ValueError for unknown names."""
    unknown = set(sections) - {section.name for section in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"config: there is no section {sorted(unknown)[0]!r}")
    return replace(Config(), **{name: value for settings in sections.values() for name, value in settings.items()})


def as_text(value: Any) -> str:
    """The value of a setting as `replace` and the command line read it: 96,96,96 or none."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _coerce(name: str, value: Any) -> Any:
    """`value` as the type of the setting `name`; ValueError where it does not fit."""
    hint = _TYPES[name]
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for candidate in (_parse(value), value):
        for option in options:
            fits, typed = _fit(candidate, option)
            if fits:
                return typed
    raise ValueError(f"config: `{name}` must be {' or '.join(_describe(option) for option in options)}, got {value!r}")


def _parse(value: Any) -> Any:
    """What a text says: a number, a tuple, true, false or none; anything else as it is."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word]
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return value


def _fit(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether `value` can stand for the type `option`, and as what."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option is types.NoneType:
        return value is None, None
    if option is int:
        return (True, int(value)) if number and value == value // 1 else (False, None)
    if option is float:
        return (True, float(value)) if number and not math.isnan(value) else (False, None)
    if get_origin(option) is tuple:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = get_args(option)
        kinds = kinds[:1] * len(values) if kinds[-1] is ... else kinds
        fits = [_fit(v, kind) for v, kind in zip(values, kinds, strict=False)]
        return len(values) == len(kinds) and all(fit for fit, _ in fits), tuple(typed for _, typed in fits)
    return isinstance(value, option), value


def _describe(option: Any) -> str:
    if get_origin(option) is tuple:
        kinds = get_args(option)
        names = [{int: "int", float: "number"}[kind] for kind in kinds if kind is not ...]
        return ",".join(names * 2) + ",..." if kinds[-1] is ... else ",".join(names)
    return {int: "an int", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}[option]
