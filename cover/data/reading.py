"""One file to arrays: its format, which of its volumes, axis order, voxel size; not yet channels and intensities."""

import gzip
import math
import os
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, io_orientation

from cover.config import DataConfig
from cover.data.pictures import check_shape, decode_picture
from cover.data.report import ImageError, image_errors

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")
SUFFIXES = (*PICTURES, *NIFTI, ".npy")
_DEFLATE = 1032  # no gzip stream holds more than this many times its size
_CHUNK = 2**20  # bytes
_NIFTI2_HEADER = 540  # bytes; that of NIfTI-1 has 348
_LARGEST_OFFSET = 2**26  # bytes before the voxels of a NIfTI: nibabel reads them into memory
_LARGEST_VOXEL = 16  # bytes of a picture: four channels of float32
_MILLIMETRES = {"meter": 1e3, "micron": 1e-3}


class Decoded(NamedTuple):
    """array: [V, C, *S], V images of C stored channels each, real numbers; spacing: mm per axis of S, None: unknown."""

    array: np.ndarray
    spacing: tuple[float, ...] | None


def from_volumes(config: DataConfig) -> bool:
    """Whether the files must hold volumes: for 3D training, and for 2D training from slices."""
    return len(config.crop) == 3 or config.slice_axis is not None


@image_errors("cannot be read")
def read(path: Path, config: DataConfig) -> Decoded:
    """Decode one file.

    NIfTI axes are brought to nibabel's canonical order: left to right, posterior to anterior, inferior to superior.
    `config.volumes` picks from a 4D NIfTI: "all" gives V images, an index one, "channels" one image of that many
    channels. A `.npy` is [*S] or [C, *S] with 1, 3 or `in_channels` channels.

    Raises:
        ImageError: the file cannot be used. ImportError: it needs an extra that is not installed.
    """
    name = path.name.lower()
    if path.is_dir():
        os.scandir(path).close()  # raises where the search for files could not look into it
        raise ImageError("is a folder; expected an image")
    if not path.exists():
        raise ImageError("no such file")
    if not path.is_file():  # opening a pipe would wait for a writer, and a device need not end
        raise ImageError("is a pipe, a socket or a device; expected an image")
    size = path.stat().st_size
    if size == 0:
        raise ImageError("empty file")
    if name.endswith(PICTURES):
        if size > config.max_voxels * _LARGEST_VOXEL + _LARGEST_OFFSET:
            raise ImageError(f"is {size:,} bytes long, more than a picture of `max_voxels` can be")
        decoded = Decoded(decode_picture(path.read_bytes(), config.max_voxels)[None], None)
    elif name.endswith(NIFTI):
        decoded = _read_nifti(path, config)
    elif name.endswith(".npy"):
        decoded = _read_npy(path, config)
    else:
        raise ImageError(f"its format is not known; expected one of {' '.join(SUFFIXES)}")
    _check_dimensions(decoded.array.shape[2:], config)
    return decoded


def _read_nifti(path: Path, config: DataConfig) -> Decoded:
    zipped, size = path.name.lower().endswith(".gz"), path.stat().st_size
    with (gzip.open if zipped else open)(path, "rb") as stream:
        _check_nifti_header(stream.read(_NIFTI2_HEADER))
    image = nibabel.load(path)
    if not zipped:
        return _decode_nifti(image, size, config)
    end = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    with gzip.open(path) as stream:
        decoded = _decode_nifti(type(image).from_stream(stream), size * _DEFLATE, config)
        while stream.read(_CHUNK):  # to the end, where the checksum is: nibabel stops after the last voxel
            if stream.tell() > end + _CHUNK:
                raise ImageError(f"holds more than the {end:,} bytes that its header claims")
    return decoded


def _check_nifti_header(start: bytes) -> None:
    """Check what nibabel would obey or pass over: where the voxels are, and a scale that is not finite.

    Args:
        start: the first bytes of the file, as many as the longer header has.
    """
    sizes = (int.from_bytes(start[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Header if _NIFTI2_HEADER in sizes else nibabel.Nifti1Header
    header = kind(start[: kind.template_dtype.itemsize], check=False)
    offset, slope, intercept = (float(header[name]) for name in ("vox_offset", "scl_slope", "scl_inter"))
    if not 0 <= offset <= _LARGEST_OFFSET:
        raise ImageError(f"its header claims that the voxels begin at byte {offset:g}")
    if slope != 0 and not (math.isfinite(slope) and math.isfinite(intercept)):  # a slope of 0 stands for no scale
        raise ImageError(f"its scale is not finite: scl_slope {slope:g}, scl_inter {intercept:g}")


def _decode_nifti(image: nibabel.spatialimages.SpatialImage, most: int, config: DataConfig) -> Decoded:
    """The volumes of an image that can hold at most `most` bytes."""
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[4:]):
        raise ImageError(f"expected a 3D or 4D NIfTI, got shape {shape}")
    if len(shape) > 3 and isinstance(config.volumes, int):
        if not 0 <= config.volumes < shape[3]:
            raise ImageError(f"has {shape[3]} volumes; `volumes` asks for number {config.volumes}")
        check_shape(shape[:3], config.max_voxels)
        image = image.slicer[:, :, :, config.volumes : config.volumes + 1]
    check_shape(image.shape, config.max_voxels)
    dtype = _check_real(image.get_data_dtype())
    # memory is set aside by what the header claims, so that the claim must be possible
    if math.prod(image.shape) * dtype.itemsize > most:
        raise ImageError(
            f"is cut off: its header claims shape {image.shape} of {dtype}, the file is too short for that"
        )
    if not np.isfinite(image.affine).all() or np.linalg.det(image.affine[:3, :3]) == 0:
        raise ImageError("its affine is singular: neither axis order nor voxel size are known")
    if dtype.names:  # RGB or RGBA
        pixels = np.asanyarray(image.dataobj)
        array = np.stack([pixels[channel] for channel in "RGB"], axis=-1)
    else:
        array = image.get_fdata(dtype=np.float32, caching="unchanged")[..., None]
    array = array.reshape(*image.shape[:3], -1, array.shape[-1])
    if config.volumes == "channels":
        array = array.reshape(*image.shape[:3], 1, -1)

    orientation = io_orientation(image.affine)
    array = np.moveaxis(apply_orientation(array, orientation), (3, 4), (0, 1))
    sizes = voxel_sizes(image.affine) * _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    spacing = sizes[np.argsort(orientation[:, 0])]
    flat = [axis for axis in range(3) if array.shape[2 + axis] == 1]
    if len(flat) == 1 and not from_volumes(config):  # a radiograph stored as NIfTI
        array, spacing = array.squeeze(2 + flat[0]), np.delete(spacing, flat[0])
    return Decoded(array, tuple(map(float, spacing)))


def _read_npy(path: Path, config: DataConfig) -> Decoded:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)  # np.load would take any other file for a pickle
        length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > path.stat().st_size:  # numpy sets aside what it is told
        raise ImageError(f"is cut off: its header claims {length:,} bytes for itself")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    check_shape(array.shape, config.max_voxels)
    if _check_real(array.dtype).names:
        raise ImageError(f"expected real numbers, got {array.dtype}")
    d = 3 if from_volumes(config) else 2
    if array.ndim == d + 1 and array.shape[0] in (1, 3, config.in_channels):
        return Decoded(array[None], None)
    return Decoded(array[None, None], None)


def _check_real(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in "uifb" and not dtype.names:  # names: the colours of a NIfTI
        raise ImageError(f"expected real numbers, got {dtype}")
    return dtype


def _check_dimensions(shape: tuple[int, ...], config: DataConfig) -> None:
    d = 3 if from_volumes(config) else 2
    if len(shape) != d or min(shape) < 2:
        hint = "; set `slice_axis` to train in 2D from slices" if len(shape) == 3 and d == 2 else ""
        raise ImageError(f"expected a {d}D image, every axis at least 2 long, got shape {tuple(shape)}{hint}")
