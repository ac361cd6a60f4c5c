"""PNG, JPEG and TIFF files: decoded by opencv, after a look at the header for what opencv would not say."""

import struct

import numpy as np

from cover.data.report import ImageError


def decode_picture(data: bytes, max_voxels: int) -> np.ndarray:
    """A picture of 8 or 16 bits (TIFF: also float32) as [1, H, W] or, in colour, [3, H, W] (red, green, blue).

    Transparency is dropped and a JPEG's orientation tag obeyed. Nothing is decoded if the header is wrong.

    Raises:
        ImageError: the file is cut off, has several pages, or claims more than `max_voxels` pixels.
        ImportError: opencv is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("PNG, JPEG and TIFF need opencv: pip install 'cover-vcl[images]'") from error
    try:
        height, width = _shape_in_header(data)
    except (struct.error, IndexError, KeyError) as error:
        raise ImageError("is cut off or damaged: its header makes no sense") from error
    check_shape((height, width), max_voxels)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    if pixels is None:
        raise ImageError("cannot be decoded by opencv: damaged, or of a kind that it does not know")
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels[..., ::-1], -1, 0)


def check_shape(shape: tuple[int, ...], max_voxels: int) -> None:
    """Check what a header claims before memory is spent on it."""
    if min(shape, default=0) < 1:
        raise ImageError(f"empty: its shape is {tuple(shape)}")
    # Python integers: the product of what a damaged header claims may not fit into 64 bits
    voxels = 1
    for size in shape:
        voxels *= int(size)
    if voxels > max_voxels:
        raise ImageError(f"claims {voxels:,} voxels, shape {tuple(shape)}; `max_voxels` allows {max_voxels:,}")


def _shape_in_header(data: bytes) -> tuple[int, int]:
    """(H, W) as the header says."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if data.startswith(b"\xff\xd8"):
        return _shape_in_jpeg(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        return _shape_in_tiff(data)
    raise ImageError("is not a PNG, JPEG or TIFF file, whatever its name says")


def _shape_in_jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        while data[at + 1] == 0xFF:  # fill bytes may stand before any marker
            at += 1
        marker, length = struct.unpack_from(">xBH", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame, of any coding
            break
        at += 2 + length
    # decoders fill what is missing with grey and succeed; within a scan the end marker cannot occur
    if data.rfind(b"\xff\xd9") < at:
        raise ImageError("is cut off: the JPEG has no end marker")
    height, width = struct.unpack_from(">HH", data, at + 5)
    return height, width


def _shape_in_tiff(data: bytes) -> tuple[int, int]:
    order = "<" if data.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    tags = {}
    for at in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)
    (following,) = struct.unpack_from(order + "I", data, directory + 2 + 12 * count)
    if following:
        raise ImageError("has several pages; expected a TIFF of one (volumes: use NIfTI or .npy)")
    return tags[257], tags[256]
