"""A decoded image to what the network sees: channels, voxel size or picture size, intensities; float32, z-scored."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from cover.config import DataConfig
from cover.data.pictures import check_shape
from cover.data.reading import from_volumes
from cover.data.report import ImageError, image_errors

_LARGEST = 1e30  # beyond it, sums of squares leave float32
_FOREGROUND_POSITIONS = 4096


@image_errors("cannot be prepared")
def prepare(array: np.ndarray, spacing: tuple[float, ...] | None, config: DataConfig) -> tuple[np.ndarray, str | None]:
    """One image, ready for cropping.

    Args:
        array: [C, *S], real numbers, as decoded.
        spacing: mm per axis, None where the file does not say.
        config: `in_channels`, `spacing`, `resize`, `slice_axis` and the settings of normalisation count.

    Returns:
        float32 [in_channels, *S'], contiguous; with `slice_axis` the slices are the first axis of S'. And a note on
        what was repaired, or None.

    Raises:
        ImageError: the image cannot be used.
    """
    with np.errstate(over="ignore"):  # float64 beyond float32: infinite, then filled
        x = np.array(array, dtype=np.float32, order="C")
    note = _fill_unusable(x)
    x = _fit_channels(x, config.in_channels)
    _check_varies(x, "constant")
    if config.spacing is not None:
        x = resample(x, _resampled_shape(x.shape[1:], spacing, config))
    elif config.resize is not None and not from_volumes(config):
        x = resample(x, config.resize)
    normalise(x, config)
    if config.slice_axis is not None:
        x = np.ascontiguousarray(np.moveaxis(x, 1 + config.slice_axis, 1))
    return x, note


def normalise(x: np.ndarray, config: DataConfig) -> None:
    """Normalise float32 [C, *S] in place, each channel by itself.

    "percentile": clip to `config.percentiles`, then z-score. "zscore": z-score only. "hounsfield": clip to the window
    `config.hounsfield` and scale it to mean 0 and standard deviation 1 of evenly spread values, (HU - centre) /
    (width / sqrt(12)): the same tissue gets the same value in every image.

    Raises:
        ImageError: nothing varies inside the Hounsfield window.
    """
    if config.normalise == "hounsfield":
        low, high = config.hounsfield
        np.clip(x, low, high, out=x)
        _check_varies(x, f"constant inside the Hounsfield window {low:g} to {high:g}")
        x -= (low + high) / 2
        x /= (high - low) / math.sqrt(12)
        return
    for channel in x:
        if config.normalise == "percentile":
            low, high = np.percentile(channel, config.percentiles)
            if low < high:  # else all but a few voxels are equal: clipping would leave nothing of the image
                np.clip(channel, low, high, out=channel)
        channel -= channel.mean(dtype=np.float64)
        # a float64 divisor: the deviation of tiny values is a subnormal float32
        channel /= channel.std(dtype=np.float64) or 1.0


def resample(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample float32 [C, *S] to [C, *shape], half-pixel centres: linear, over a wider kernel where it shrinks."""
    if x.shape[1:] == tuple(shape):
        return x
    *outer, height, width = shape
    # torch has this kernel in 2D only; it is separable, so a volume takes the last two axes and then the first
    y = torch.from_numpy(x).flatten(0, -3)[None]
    y = F.interpolate(y, size=(height, width), mode="bilinear", antialias=True)
    if outer:
        y = y.reshape(1, x.shape[0], x.shape[1], height * width)
        y = F.interpolate(y, size=(outer[0], height * width), mode="bilinear", antialias=True)
    return y.reshape(x.shape[0], *shape).numpy()


def foreground_positions(x: np.ndarray) -> np.ndarray:
    """Positions of voxels brighter than the mean, int32 [4096, d], spread evenly over all such voxels of [C, *S]."""
    grey = x.mean(0)
    voxels = np.flatnonzero(grey > grey.mean(dtype=np.float64))
    if not len(voxels):  # channels that cancel
        voxels = np.arange(grey.size)
    chosen = voxels[np.linspace(0, len(voxels) - 1, _FOREGROUND_POSITIONS).astype(np.int64)]
    return np.stack(np.unravel_index(chosen, grey.shape), axis=-1).astype(np.int32)


def _fill_unusable(x: np.ndarray) -> str | None:
    """Set NaN, infinite and absurd voxels to the lowest value of their channel: in practice they are background."""
    usable = np.abs(x) < _LARGEST
    if usable.all():
        return None
    if not usable.any():
        raise ImageError(f"filled with NaN, infinite values or values beyond {_LARGEST:g}")
    for channel, good in zip(x, usable, strict=True):
        channel[~good] = channel[good].min() if good.any() else 0
    return f"{1 - usable.mean():.2%} of its voxels are NaN, infinite or beyond {_LARGEST:g}: set to its lowest value"


def _fit_channels(x: np.ndarray, channels: int) -> np.ndarray:
    if len(x) == channels:
        return x
    if channels == 1:
        return x.mean(0, keepdims=True)
    if len(x) == 1:
        return np.repeat(x, channels, axis=0)
    raise ImageError(f"has {len(x)} channels; `in_channels` is {channels}")


def _check_varies(x: np.ndarray, problem: str) -> None:
    low, high = x.min(), x.max()
    if low == high:
        raise ImageError(f"{problem}: every voxel is {low:g}")


def _resampled_shape(shape: tuple[int, ...], spacing: tuple[float, ...] | None, config: DataConfig) -> tuple[int, ...]:
    if spacing is None or not all(math.isfinite(size) and size > 0 for size in spacing):
        raise ImageError(f"its voxel size is {spacing or 'unknown'}; resampling to `spacing` needs one")
    wanted = tuple(max(2, round(n * size / to)) for n, size, to in zip(shape, spacing, config.spacing, strict=True))
    check_shape(wanted, config.max_voxels)
    return wanted
