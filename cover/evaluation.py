"""Held-out evaluation: endpoint error (EPE) of the predicted displacements, under transforms that never change."""

import contextlib
import warnings
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cover import checkpoint, processes
from cover.config import Config, ModelConfig, replace
from cover.data import ImageSet, PretrainDataset, batches_of, open_images
from cover.losses import epe
from cover.model import COVER, build_model
from cover.rng import Draws
from cover.views import ViewMaker, fit_to_reach, reachable_fraction

# crops, displacements and appearance of every evaluation, whatever the seed of the run: runs can be compared
HELD_OUT_SEED = 2506_20850

_BIN, _BINS = 0.01, 100_000  # voxels; errors beyond 1000 voxels share the last bin


@dataclass(frozen=True)
class ErrorSummary:
    """Endpoint errors of many voxels: in voxels, and shares from 0 to 1."""

    epe_mean: float
    epe_median: float
    epe_p95: float  # 95th percentile
    within_1: float  # share of errors of at most 1 voxel
    within_3: float


@dataclass(frozen=True)
class Evaluation:
    """What a network does on held-out images, beside predicting no displacement at all; `print` shows a table."""

    model: ErrorSummary
    zero: ErrorSummary
    patches: int
    voxels: int  # whose match lies inside view a: the others do not count
    reachable: float  # share of the voxels whose true vector the pyramid can express

    def as_record(self) -> dict[str, float]:
        """The figures by flat names, those of predicting zero with the suffix `_zero`."""
        zero = {f"{name}_zero": value for name, value in asdict(self.zero).items()}
        return asdict(self.model) | zero | {"reachable_fraction": self.reachable}

    def __str__(self) -> str:
        lines = [f"{'':<16}{'EPE mean':>10}{'median':>10}{'95 %':>10}{'<= 1 voxel':>12}{'<= 3 voxels':>13}"]
        for name, row in (("COVER", self.model), ("predicting zero", self.zero)):
            errors = "".join(f"{value:>10.2f}" for value in (row.epe_mean, row.epe_median, row.epe_p95))
            lines.append(f"{name:<16}{errors}{row.within_1:>11.1%} {row.within_3:>12.1%}")
        lines.append(
            f"errors in voxels, over {self.voxels} voxels of {self.patches} patches; "
            f"{self.reachable:.1%} of the true vectors are within reach"
        )
        return "\n".join(lines)


class ErrorHistogram:
    """Collects endpoint errors in constant memory: mean and shares exact, percentiles to a hundredth of a voxel."""

    def __init__(self):
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.total = 0.0
        self.within = {1: 0, 3: 0}

    def add(self, errors: Tensor) -> None:
        """Errors in voxels, float [n]."""
        bins = (errors / _BIN).nan_to_num(nan=_BINS).clamp(max=_BINS - 1).long()  # NaN is beyond every limit
        self.counts += torch.bincount(bins, minlength=_BINS).cpu()
        self.total += errors.sum(dtype=torch.float64).item()
        for limit in self.within:
            self.within[limit] += (errors <= limit).sum().item()

    def merge(self, device: torch.device) -> None:
        """Add what all processes have collected; `device` is one that they can communicate from."""
        self.counts = processes.total(self.counts.to(device)).cpu()
        sums = torch.tensor([self.total, *self.within.values()], dtype=torch.float64, device=device)
        self.total, *within = processes.total(sums).tolist()
        self.within = dict(zip(self.within, within, strict=True))

    def summary(self) -> ErrorSummary:
        """NaN throughout when there were no errors."""
        count = self.counts.sum().item()
        if count == 0:
            return ErrorSummary(*[float("nan")] * 5)
        cumulated = self.counts.cumsum(0)
        median, p95 = ((torch.searchsorted(cumulated, share * count).item() + 0.5) * _BIN for share in (0.5, 0.95))
        return ErrorSummary(self.total / count, median, p95, self.within[1] / count, self.within[3] / count)


def held_out_keys(images: int, samples: int) -> list[tuple[int, int]]:
    """(epoch, index) of the patches of an evaluation: spread over the images, each `samples / images` times."""
    if samples < images:
        return [(0, k * images // samples) for k in range(samples)]
    return [divmod(k, images) for k in range(samples)]


def held_out_batches(
    images: ImageSet,
    config: Config,
    margin: tuple[int, ...],
    samples: int,
    warn: Callable[[str], None] = warnings.warn,
) -> Generator[dict[str, Tensor], None, None]:
    """The patches of an evaluation, in batches: the same in every call. Processes share them out.

    `warn` is told of every image that can no longer be read, and for which another one stands in.
    """
    keys = held_out_keys(len(images), samples)[processes.rank() :: processes.count()]
    size = config.train.batch // config.train.accumulate  # what a step of training holds at a time
    batches = [keys[k : k + size] for k in range(0, len(keys), size)]
    dataset = PretrainDataset(images, config.data, margin, HELD_OUT_SEED)
    with contextlib.closing(batches_of(dataset, batches, config.data.workers)) as loaded:
        for batch in loaded:
            for complaint in filter(None, batch.pop("replaced")):
                warn(complaint)
            yield batch


@torch.no_grad()
def measure(
    model: COVER,
    images: ImageSet,
    views: ViewMaker,
    config: Config,
    samples: int,
    warn: Callable[[str], None] = warnings.warn,
) -> Evaluation:
    """Evaluate a model on `samples` patches of `images`, with the views that `views` makes; `warn` as above."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    errors, zero_errors, reachable = ErrorHistogram(), ErrorHistogram(), 0.0
    with contextlib.closing(held_out_batches(images, config, views.margin, samples, warn)) as batches:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            a, b, flow, mask = views(batch, Draws(HELD_OUT_SEED, batch["epoch"], batch["index"], device))
            errors.add(epe(model(a, b).flow, flow, mask))
            zero_errors.add(epe(torch.zeros_like(flow), flow, mask))
            reachable += reachable_fraction(flow, mask, model.pyramid.reach).item() * mask.sum().item()
    model.train(was_training)
    for histogram in (errors, zero_errors):
        histogram.merge(device)
    reachable = processes.total(torch.tensor(reachable, dtype=torch.float64, device=device)).item()
    voxels = int(errors.counts.sum())
    share = reachable / voxels if voxels else float("nan")
    return Evaluation(errors.summary(), zero_errors.summary(), samples, voxels, share)


def evaluate(
    run: str | PathLike,
    data: Any,
    split: str | None = None,
    samples: int | None = None,
    build: Callable[[Config], COVER] = build_model,
    **settings: Any,
) -> Evaluation:
    """Evaluate a run on images that it has not seen (`cover evaluate RUN DATA`).

    Args:
        run: the folder of a run (its last checkpoint is taken) or a checkpoint.
        data: as for `pretrain`: a folder, an image, a list of images, or a manifest.
        split: "train", "val" or "test", where a manifest tells them apart; None: all images.
        samples: patches; None: `val_samples`, but at least one of each image.
        build: as for `cover.load_model`: makes the model of a run whose backbone is not the U-Net.
        **settings: changes to the run's settings, such as `volumes=1` or other ranges of the displacements; those of
            the network cannot change.

    Raises:
        FileNotFoundError: no such run or data. ValueError: a setting or the data cannot be used.
    """
    model, config, views = open_run(run, build, **settings)
    images = open_images(data, config.data, split)
    if samples is None:
        samples = max(config.train.val_samples, len(images))
    if samples < 1:
        raise ValueError(f"evaluate: `samples` must be at least 1, got {samples}")
    return measure(model, images, views, config, samples)


def open_run(
    run: str | PathLike, build: Callable[[Config], COVER] = build_model, **settings: Any
) -> tuple[COVER, Config, ViewMaker]:
    """The model of a run on the device of its settings, those settings with changes, and the maker of their views.

    Raises:
        FileNotFoundError: no such run. ValueError: a setting does not fit, or would need another network.
    """
    model, config = checkpoint.load_model(Path(run), build=build)
    changed = replace(config, **{"cache": None} | settings)  # not where somebody else's checkpoint may point to
    if changed.model != config.model or changed.data.in_channels != config.data.in_channels:
        fixed = ", ".join([*ModelConfig.__dataclass_fields__, "in_channels"])
        raise ValueError(f"config: the settings of the trained network ({fixed}) cannot change")
    if len(changed.data.crop) != len(config.data.crop):
        raise ValueError(f"config: `crop` must have {len(config.data.crop)} axes, got {changed.data.crop}")
    dvf = fit_to_reach(changed.dvf, changed.data.crop, model.pyramid.reach)
    return model.to(device_of(changed)), changed, ViewMaker(dvf, changed.appearance, changed.data.crop)


def device_of(config: Config) -> torch.device:
    """The device that `config.train.device` names; ValueError where this machine has none such."""
    name = config.train.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # which a device without memory, "meta", cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"config: `device` {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
