"""How an array lies in a file of the cache: as numpy's `.npy`, or in chunks that Blosc2 compresses one by one.

Both are memory-mapped and read alike: of `array[:, 3:9, 20:40]` only the pages, or the chunks, that it touches.
"""

import mmap
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cover.data.report import ImageError


def require(store: str) -> None:
    """ImportError, which says what to install, where the library of a store is missing."""
    if store == "blosc2":
        try:
            import blosc2  # noqa: F401
        except ImportError as error:
            raise ImportError("store=blosc2 needs blosc2: pip install 'cover-vcl[store]'") from error


def save(file: BinaryIO, array: np.ndarray, store: str, chunk: tuple[int, ...]) -> None:
    """Write an array into an open file; `chunk` is the shape that is compressed at a time, clipped to the array's."""
    if store == "npy":
        np.save(file, array)
        return
    import blosc2

    chunk = tuple(map(min, chunk, array.shape))
    # the two bytes of a float16 apart, and the fastest level of zstd: docs/data.md has the measurements
    settings = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    file.write(blosc2.asarray(array, chunks=chunk, blocks=chunk, cparams=settings).to_cframe())


def load(path: Path, store: str) -> "np.ndarray | Chunked":
    """The array in a file, read-only.

    Raises:
        OSError, ValueError, EOFError: the file is not there, or cut off.
    """
    # a plain array over the map: slicing the memmap class costs ten times as much
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) if store == "npy" else Chunked(path)


class Chunked:
    """An array in a file of compressed chunks, which are decoded anew whenever they are read.

    Args:
        path: the file.

    Raises:
        OSError, ValueError: the file is not there, or cut off.
    """

    def __init__(self, path: Path):
        import blosc2

        with path.open("rb") as file:
            frame = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._array = blosc2.ndarray_from_cframe(frame)
        except RuntimeError as error:
            raise ValueError(f"{path} is no array of blosc2, or cut off: {error}") from error
        # threads of its own would compete with the other workers, and would not survive a fork
        self._array.schunk.dparams = blosc2.DParams(nthreads=1)
        self._path = path
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __getitem__(self, region: Any) -> np.ndarray:
        """A region, decoded. ImageError where a chunk is damaged."""
        try:
            return self._array[region]
        except RuntimeError as error:
            raise ImageError(f"what the cache has of it is damaged ({error}): delete {self._path}") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self[:]
        return array if dtype is None else array.astype(dtype, copy=False)
