"""A data set as a list of normalised images: opened once with every file looked at, then read by number."""

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from cover.config import DataConfig
from cover.data.cache import Cache, Entry, examine, key_of
from cover.data.manifest import Source, find, splits
from cover.data.prepare import prepare, resample
from cover.data.reading import from_volumes, read
from cover.data.report import DataError, Finding, ImageError, Report, image_errors, printable
from cover.data.store import Chunked
from cover.rng import Draws

_THREADS = 8  # each holds a whole decoded file


class ImageSet:
    """Images of one data set: files, volumes of 4D files, or slices, in the order of the data set.

    Cheap to send to worker processes. Made by `open_images`.

    Attributes:
        report: what was found when the data set was opened; a split keeps that of the whole.
    """

    def __init__(self, files: list[tuple[Source, Entry]], items: np.ndarray, config: DataConfig, cache: Cache | None):
        self._files = files
        self._items = items  # int64 [n, 3]: file, volume, slice (-1: the whole image)
        self._config = config
        self._cache = cache
        self.report = _report(files, len(items), cache)

    def __len__(self) -> int:
        return len(self._items)

    def name(self, i: int) -> str:
        """File name of image `i`, with its volume and slice where the file holds several."""
        file, volume, position = self._items[i].tolist()
        source, entry = self._files[file]
        parts = [printable(source.name)]
        if entry.count > 1:
            parts.append(f"volume {volume}")
        if position >= 0:
            parts.append(f"slice {position}")
        return ", ".join(parts)

    def read(self, i: int) -> np.ndarray:
        """Image `i`, normalised, float32 [in_channels, *S]; the array is the caller's own.

        Raises:
            ImageError: the file can no longer be used.
        """
        return np.array(self.array(i), dtype=np.float32)

    def array(self, i: int) -> np.ndarray | Chunked:
        """Image `i` without copying: [in_channels, *S], read-only memory-mapped float16 for volumes, else float32.

        With `store=blosc2` a volume is decoded where it is indexed, and only there.

        Raises:
            ImageError: the file can no longer be used.
        """
        file, volume, position = self._items[i].tolist()
        if not from_volumes(self._config):
            source, entry = self._files[file]
            decoded = read(source.path, self._config)
            _check_same(source.path, entry, self._config)
            return prepare(decoded.array[volume], decoded.spacing, self._config)[0]
        image = self._cached(Cache.volume, file, volume)
        if position < 0:
            return image
        image = image[:, position]
        return image if self._config.resize is None else resample(image.astype(np.float32), self._config.resize)

    def foreground(self, i: int) -> np.ndarray | None:
        """Positions of foreground voxels (brighter than the mean) of a volume, int [K, d]; None for 2D images.

        A volume has 4096 of them, spread evenly over all its foreground.
        """
        file, volume, position = self._items[i].tolist()
        if not from_volumes(self._config) or position >= 0:
            return None
        return self._cached(Cache.foreground, file, volume)

    def split(self, fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Hold out a share of the files at random: (train, val). What comes from one file stays together.

        At least one file is held out, unless `fraction` is 0 or there is only one file: then val is empty.
        """
        files = np.unique(self._items[:, 0])
        count = min(max(1, round(fraction * len(files))), len(files) - 1) if fraction > 0 else 0
        key = torch.zeros(len(files), dtype=torch.int64), torch.arange(len(files))
        order = torch.argsort(Draws(seed, *key).uniform("data.split"), stable=True).numpy()
        held_out = np.isin(self._items[:, 0], files[order[:count]])
        return self._subset(~held_out), self._subset(held_out)

    def _subset(self, chosen: np.ndarray) -> "ImageSet":
        subset = ImageSet(self._files, self._items[chosen], self._config, self._cache)
        subset.report = self.report
        return subset

    def _cached(self, kind, file: int, volume: int) -> np.ndarray:
        source, entry = self._files[file]
        try:
            return kind(self._cache, entry, volume)
        except (OSError, ValueError, EOFError):  # gone from the cache since the start, or damaged: decode it again
            self._cache.forget(entry)
            again = examine(source.path, self._config, self._cache)
            if volume not in again.volumes:
                raise ImageError(dict(again.problems).get(volume, "its volume is gone")) from None
            _check_same(source.path, entry, self._config)
            return kind(self._cache, again, volume)


@image_errors("cannot be looked at")
def _check_same(path: Path, entry: Entry, config: DataConfig) -> None:
    """A file that was written anew is another image, which nobody has looked at; the next start will."""
    if key_of(path, config) != entry.key:
        raise ImageError("was changed or replaced after the data set was opened")


def open_images(
    data: str | os.PathLike | Sequence[str | os.PathLike],
    config: DataConfig,
    split: str | None = None,
    cache: str | os.PathLike | None = None,
) -> ImageSet:
    """Open a data set: look at every file once, decode volumes into the cache, leave out what cannot be used.

    Args:
        data: a folder, an image, a list of images, or a CSV, JSON or text manifest (see `cover.data.manifest.find`).
        config: how to read it; `on_error` says whether unusable files are left out with a warning or fatal.
        split: "train", "val" or "test", where a manifest tells them apart; None: all images.
        cache: folder for decoded volumes, unless `config.cache` names one; None: a temporary one, removed at exit.

    Raises:
        DataError: nothing usable, a file is not (with `on_error="fail"`), no such split, or a bad manifest.
        FileNotFoundError: no such data. ImportError: a format or the store needs an extra that is not installed.
    """
    sources = find(data)
    if split is not None:
        found = splits(data)
        if split not in found:
            raise DataError(f"data: there is no split {split!r} in {data}; it has {' '.join(found) or 'no splits'}")
        sources = [source for source in sources if source.split == split]
    folder = Cache(config.cache or cache or _temporary_cache(), config.store)
    files = _examine_all(sources, config, folder)
    images = ImageSet(files, _items(files, config), config, folder)
    if images.report.problems and config.on_error == "fail":
        raise DataError(f"data: {len(images.report.problems)} files cannot be used\n{images.report.summary()}")
    if not len(images):
        raise DataError(f"data: there is no usable image among the {len(sources)} files\n{images.report.summary()}")
    if images.report.problems:
        warnings.warn(f"left out, cannot be used:\n{images.report.summary()}", stacklevel=2)
    return images


def check(data: str | os.PathLike | Sequence[str | os.PathLike], config: DataConfig) -> Report:
    """Look at every file of a data set and say what cannot be used, and why. Nothing is written."""
    files = _examine_all(find(data), config, None)
    return _report(files, len(_items(files, config)), None)


def _examine_all(sources: list[Source], config: DataConfig, cache: Cache | None) -> list[tuple[Source, Entry]]:
    # decoding leaves Python's lock alone, so that threads do; as many as the user lets torch have
    entries = []
    with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as pool:
        for entry in pool.map(functools.partial(examine, config=config, cache=cache), (s.path for s in sources)):
            entries.append(entry)
            if sys.stderr.isatty():
                end = "\n" if len(entries) == len(sources) else ""
                print(f"\rlooking at the data: {len(entries)} of {len(sources)} files", end=end, file=sys.stderr)
    return list(zip(sources, entries, strict=True))


def _items(files: list[tuple[Source, Entry]], config: DataConfig) -> np.ndarray:
    items = []
    for file, (_, entry) in enumerate(files):
        slices = entry.slices if config.slice_axis is not None else [[-1]] * len(entry.volumes)
        items += [(file, v, position) for v, chosen in zip(entry.volumes, slices, strict=True) for position in chosen]
    # one array, not a list: workers share its memory instead of copying it by counting references
    return np.array(items, dtype=np.int64).reshape(-1, 3)


def _report(files: list[tuple[Source, Entry]], images: int, cache: Cache | None) -> Report:
    def findings(kind: str) -> tuple[Finding, ...]:
        return tuple(
            Finding(f"{source.name}, volume {volume}" if entry.count > 1 else source.name, what)
            for source, entry in files
            for volume, what in getattr(entry, kind)
        )

    repeated = (Finding(s.name, f"is there {s.times} times: used once") for s, _ in files if s.times > 1)
    sizes = {name: size for _, entry in files for name, size in entry.sizes.items()}
    spacings = sorted({entry.spacing for _, entry in files if entry.spacing is not None and entry.volumes})
    return Report(
        files=len(files),
        images=images,
        problems=findings("problems"),
        notes=(*findings("notes"), *repeated),
        spacings=tuple(spacings),
        cache=str(cache.folder) if sizes else None,
        cache_bytes=sum(sizes.values()),
    )


def _temporary_cache() -> str:
    folder, owner = tempfile.mkdtemp(prefix="cover-cache-"), os.getpid()

    def remove():
        if os.getpid() == owner:  # not when a forked copy of this process ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
