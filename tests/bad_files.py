"""The corpus of bad files: how each is made, and what is to be said about it. Nothing of it is committed.

`VOLUMES` and `PICTURES` have a row (name, maker, text that its reason must hold) for each file of the corpus.
"""

import gzip
import json
import os
import socket
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np

CUBE = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
PICTURE = (np.add.outer(np.arange(24) * 5, np.arange(33) * 3) % 251).astype(np.uint8)
PIXELS = PICTURE.tobytes()


def content(data):
    return lambda path: path.write_bytes(data)


def array(x):
    return lambda path: np.save(path, x, allow_pickle=True)


def npy(header, data=b"", version=(1, 0), length=None):
    """A .npy whose header is this text."""
    packed = struct.pack("<H" if version == (1, 0) else "<I", len(header) if length is None else length)
    return content(b"\x93NUMPY" + bytes(version) + packed + header.encode("latin1") + data)


def npy_of(shape, data=b""):
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n", data)


def nifti(x=CUBE, *, edit=lambda data: data, affine=None, kind=nibabel.Nifti1Image, **fields):
    """A NIfTI of this array, with other bytes in its header: `at_108=...` replaces what is there."""

    def make(path):
        raw = bytearray(kind(x, np.eye(4) if affine is None else affine).to_bytes())
        for field, new in fields.items():
            at = int(field.removeprefix("at_"))
            raw[at : at + len(new)] = new
        path.write_bytes(edit(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw)))

    return make


def dims(*sizes, count=None):
    return struct.pack("<8h", len(sizes) if count is None else count, *sizes, *([1] * (7 - len(sizes))))


def sform(matrix):
    """The fields of an affine."""
    return {"at_252": struct.pack("<2h", 0, 1), "at_280": struct.pack("<12f", *np.ravel(matrix))}


def extension(size):
    """An extension of the header that claims to have so many bytes."""
    return {"at_108": struct.pack("<f", size + 352), "at_348": b"\1\0\0\0" + struct.pack("<2i", size // 16 * 16, 0)}


def bomb(path, gigabytes=4):
    """A good small volume in a gzip stream that goes on with zeros."""
    whole = zlib.compressobj(9, wbits=31)
    start = whole.compress(nibabel.Nifti1Image(CUBE, np.eye(4)).to_bytes()) + whole.flush(zlib.Z_FULL_FLUSH)
    block = whole.compress(bytes(2**24)) + whole.flush(zlib.Z_FULL_FLUSH)  # does not depend on what came before
    path.write_bytes(start + block * (64 * gigabytes))


def picture(image=PICTURE, edit=lambda data: data):
    def make(path):
        import cv2

        path.write_bytes(edit(cv2.imencode(path.suffix, image)[1].tobytes()))

    return make


def pages(path):
    import cv2

    cv2.imwritemulti(str(path), [PICTURE] * 2)


def tiff(height=24, width=33, data=PIXELS, following=0, strip=None):
    """A TIFF of one uncompressed strip, its directory before the pixels."""
    at = 8 + 2 + 9 * 12 + 4
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: height, 279: strip or len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return content(b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", following) + data)


def cut(share):
    return lambda data: data[: int(share * len(data))]


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def png_claims(width, height, depth=8):
    """Another size in the header, its checksum right."""

    def edit(data):
        header = b"IHDR" + struct.pack(">IIB", width, height, depth) + data[25:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]

    return edit


def jpeg_claims(width, height):
    def edit(data):
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]

    return edit


def sparse(path):
    """A terabyte that takes no space."""
    picture()(path)
    os.truncate(path, 2**40)


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link(to):
    return lambda path: path.symlink_to(to)


def nothing(path):
    pass


VOLUMES = [
    # what is no file, and names
    ("folder.npy", Path.mkdir, "is a folder"),
    ("pipe.npy", os.mkfifo, "is a pipe"),
    ("socket.nii", a_socket, "is a pipe, a socket"),
    ("device.nii.gz", link("/dev/zero"), "or a device"),
    ("itself.npy", link("itself.npy"), "symbolic links"),
    ("there.nii", link("back.nii"), "symbolic links"),
    ("back.nii", link("there.nii"), "symbolic links"),
    ("broken.npy", link("nowhere.npy"), "no such file"),
    ("here.nii", link("."), "is a folder"),
    ("missing.nii.gz", nothing, "no such file"),
    ("/nowhere/at/all.nii", nothing, "no such file"),
    ("nul\0.npy", nothing, "embedded null byte"),
    ("surrogate\ud800.npy", nothing, "surrogates not allowed"),
    ("n" * 300 + ".npy", nothing, "too long"),
    ("line\nbreak.npy", content(b""), "empty file"),
    ("escape\x1b[2J.npy", content(b""), "empty file"),
    ("not utf8 \udcff.nii", content(b""), "empty file"),
    # .nii and .nii.gz
    ("empty.nii.gz", content(b""), "empty file"),
    ("text.nii", content(b"hello"), "cannot be read"),
    ("text.nii.gz", content(b"hello"), "cannot be read: BadGzipFile"),
    ("zeros.nii", content(bytes(1000)), "cannot be read"),
    ("ones.nii", content(b"\xff" * 1000), "its header claims that the voxels begin"),
    ("plain.nii.gz", lambda path: nifti()(path.with_suffix(".nii")) or path.with_suffix(".nii").rename(path), "Gzip"),
    ("zipped.nii", nifti(edit=gzip.compress), "cannot be read"),
    ("magic.nii", nifti(at_344=b"xyz\0"), "cannot be read"),
    ("header.nii", nifti(edit=lambda data: data[:200]), "cannot be read"),
    ("cut.nii", nifti(edit=cut(0.7)), "is cut off"),
    ("cut.nii.gz", nifti(np.random.default_rng(0).random((20, 20, 20)), edit=cut(0.7)), "EOFError"),
    ("checksum.nii.gz", nifti(edit=lambda data: flip(len(data) - 6)(data)), "CRC check failed"),
    ("garbage.nii.gz", nifti(edit=lambda data: data + b"garbage"), "BadGzipFile"),
    ("bomb.nii.gz", bomb, "holds more than the"),
    ("vast.nii.gz", nifti(at_40=dims(32000, 32000, 32000)), "claims 32,768,000,000,000 voxels"),
    ("vast.nii", nifti(at_40=dims(*[32767] * 7)), "expected a 3D or 4D NIfTI"),
    ("lies.nii.gz", nifti(at_40=dims(600, 600, 600)), "the file is too short"),
    ("lies.nii", nifti(at_40=dims(600, 600, 600)), "the file is too short"),
    ("lies twice.nii", nifti(kind=nibabel.Nifti2Image, at_24=struct.pack("<q", 2**62)), "voxels"),
    ("negative.nii", nifti(at_40=dims(-5, 5, 5)), "empty: its shape"),
    ("zero.nii", nifti(at_40=dims(5, 0, 5)), "empty: its shape"),
    ("0d.nii", nifti(at_40=dims(count=0)), "expected a 3D or 4D NIfTI"),
    ("2d.nii", nifti(at_40=dims(5, 42)), "expected a 3D or 4D NIfTI"),
    ("count.nii", nifti(at_40=dims(5, 6, 7, count=9)), "cannot be read"),
    ("5d.nii", nifti(np.ones((5, 5, 5, 1, 3), np.float32)), "expected a 3D or 4D NIfTI"),
    ("slice.nii", nifti(CUBE[..., :1]), "expected a 3D image"),
    ("one.nii.gz", nifti(CUBE[:1, :1, :1]), "every axis at least 2 long"),
    ("type.nii", nifti(at_70=struct.pack("<h", 9999)), "cannot be read"),
    ("complex.nii", nifti(CUBE.astype(np.complex64)), "expected real numbers"),
    ("slope nan.nii", nifti(at_112=struct.pack("<f", np.nan)), "its scale is not finite"),
    ("slope infinite.nii.gz", nifti(at_112=struct.pack("<f", np.inf)), "its scale is not finite"),
    ("intercept infinite.nii", nifti(at_116=struct.pack("<f", -np.inf)), "its scale is not finite"),
    ("singular.nii", nifti(**sform(np.zeros((3, 4)))), "its affine is singular"),
    ("affine nan.nii", nifti(**sform(np.full((3, 4), np.nan))), "its affine is singular"),
    ("affine infinite.nii.gz", nifti(**sform(np.full((3, 4), np.inf))), "its affine is singular"),
    ("offset nan.nii", nifti(at_108=struct.pack("<f", np.nan)), "begin at byte nan"),
    ("offset negative.nii", nifti(at_108=struct.pack("<f", -4000)), "begin at byte -4000"),
    ("offset far.nii.gz", nifti(at_108=struct.pack("<f", 3e9)), "begin at byte 3e+09"),
    ("extension.nii.gz", nifti(**extension(2**30)), "begin at byte"),
    ("extension cut.nii.gz", nifti(**extension(2**20)), "cannot be read"),
    ("nan.nii.gz", nifti(CUBE * np.nan), "filled with NaN"),
    ("infinite.nii", nifti(CUBE * np.inf), "filled with NaN, infinite"),
    ("flat.nii.gz", nifti(CUBE * 0), "constant: every voxel is 0"),
    # .npy
    ("empty.npy", content(b""), "empty file"),
    ("text.npy", content(b"hello"), "cannot be read"),
    ("magic.npy", content(b"\x93NUMPY"), "cannot be read"),
    ("version.npy", npy("{}", version=(9, 0)), "cannot be read"),
    ("zip.npy", content(b"PK\3\4" + bytes(100)), "cannot be read"),
    ("header.npy", npy("{'descr': '<f4', 'fort"), "cannot be read"),
    ("brackets.npy", npy("(" * 9000), "cannot be read"),
    ("code.npy", npy("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,)}"), "cannot be read"),
    ("length.npy", npy("{}", version=(2, 0), length=2**32 - 1), "its header claims 4,294,967,295 bytes for itself"),
    ("cut.npy", npy_of((5, 6, 7), bytes(400)), "cannot be read"),
    ("vast.npy", npy_of((10**9, 10**9, 10**9)), "cannot be read"),
    ("overflow.npy", npy_of((2**62, 2**62, 4)), "cannot be read"),
    ("negative.npy", npy_of((-5, 6, 7), bytes(999)), "cannot be read"),
    ("fraction.npy", npy_of((5.5, 6, 7), bytes(999)), "cannot be read"),
    ("0d.npy", array(np.float32(3)), "empty: its shape is ()"),
    ("1d.npy", array(CUBE.ravel()), "expected a 3D image"),
    ("5d.npy", array(CUBE[None, None]), "expected a 3D image"),
    ("nothing.npy", array(CUBE[:0]), "empty: its shape"),
    ("one.npy", array(CUBE[:1, :1, :1]), "expected a 3D image, every axis at least 2 long"),
    ("pickle.npy", array(np.full((5, 6, 7), {})), "cannot be read"),
    ("objects.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2, 2)}", b"x" * 99), "cannot be read"),
    ("complex.npy", array(CUBE * 1j), "expected real numbers, got complex64"),
    ("structured.npy", array(np.zeros((5, 6, 7), "f4,i2")), "expected real numbers"),
    ("void.npy", array(np.zeros((5, 6, 7), "V4")), "expected real numbers, got |V4"),
    ("text type.npy", array(np.full((5, 6, 7), "3")), "expected real numbers, got <U1"),
    ("dates.npy", array(np.zeros((5, 6, 7), "M8[s]")), "expected real numbers"),
    ("fortran flat.npy", array(np.asfortranarray(CUBE * 0)), "constant"),
]

PICTURES = [
    ("missing.png", nothing, "no such file"),
    ("unknown.xyz", content(b"hello"), "format is not known"),
    ("pipe.tif", os.mkfifo, "is a pipe"),
    ("device.png", link("/dev/zero"), "or a device"),
    ("sparse.png", sparse, "bytes long, more than a picture"),
    ("empty.jpg", content(b""), "empty file"),
    ("text.png", content(b"hello"), "is not a PNG"),
    ("gif.png", content(b"GIF89a" + bytes(50)), "is not a PNG"),
    ("header.png", picture(edit=lambda data: data[:20]), "damaged"),
    ("half.png", picture(edit=cut(0.5)), "cannot be decoded"),
    ("end.png", picture(edit=lambda data: data[:-16]), "cannot be decoded"),
    ("checksum.png", picture(edit=lambda data: flip(len(data) // 2)(data)), "cannot be decoded"),
    ("vast.png", picture(edit=png_claims(60_000, 60_000)), "claims 3,600,000,000 voxels"),
    ("lies.png", picture(edit=png_claims(16_000, 16_000)), "cannot be decoded"),
    ("zero.png", picture(edit=png_claims(0, 9)), "empty: its shape"),
    ("depth.png", picture(edit=png_claims(33, 24, depth=3)), "cannot be decoded"),
    ("one.png", picture(PICTURE[:1, :1]), "every axis at least 2 long"),
    ("row.png", picture(PICTURE[:1]), "every axis at least 2 long"),
    ("flat.png", picture(np.full((9, 9), 7, np.uint8)), "constant: every voxel is 7"),
    ("start.jpg", content(b"\xff\xd8"), "damaged"),
    ("fill.jpg", content(b"\xff\xd8" + b"\xff" * 999), "damaged"),
    ("half.jpg", picture(edit=cut(0.5)), "is cut off"),
    ("end.jpg", picture(edit=lambda data: data[:-2]), "is cut off"),
    ("vast.jpg", picture(edit=jpeg_claims(65_535, 65_535)), "claims 4,294,836,225 voxels"),
    ("zero.jpg", picture(edit=jpeg_claims(33, 0)), "empty: its shape"),
    ("half.tif", picture(edit=cut(0.5)), "is cut off"),
    ("strip.tif", tiff(data=PIXELS[:-100], strip=len(PIXELS)), "cannot be decoded"),
    ("pages.tif", pages, "several pages"),
    ("circle.tif", tiff(following=8), "several pages"),
    ("directory.tif", content(b"II*\0" + struct.pack("<I", 2**32 - 1) + bytes(99)), "damaged"),
    ("no tags.tif", content(b"II*\0" + struct.pack("<IHI", 8, 0, 0)), "damaged"),
    ("vast.tif", tiff(2**32 - 1, 2**32 - 1), "voxels"),
    ("lies.tif", tiff(16_000, 16_000), "cannot be decoded"),
    ("big.tif", content(b"II+\0" + bytes(99)), "is not a PNG, JPEG or TIFF"),
    ("nan.tif", picture(np.full((9, 9), np.nan, np.float32)), "filled with NaN"),
    ("volume.npy", array(CUBE), "set `slice_axis`"),
    ("row.npy", array(CUBE[0, :1]), "at least 2 long"),
    ("volume.nii", nifti(), "set `slice_axis`"),
]


def make(folder, rows):
    """Makes the files of `rows` in `folder`; returns a manifest that lists them."""
    for name, maker, _ in rows:
        maker(folder / name)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps([name for name, *_ in rows]))
    return manifest
