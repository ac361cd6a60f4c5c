"""Decoded volumes on disk, memory-mapped, and what is known of every file, so that nothing is decoded twice.

A file's key is a hash of its path, modification time, size and of all settings that shape its content: an entry of a
changed file or of other settings is simply never asked for. Volumes are files as `cover.data.store` makes them (under a
suffix of their own: a cache inside the data folder must not be taken for data), written under a temporary name, flushed
and renamed; then one line is appended to `index.jsonl`. Only what the index lists, with files of the size it says, is
trusted: a writer killed at any moment leaves nothing that counts. Several processes may share the folder; at worst they
decode the same file twice and rename identical files over each other.
"""

import dataclasses
import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cover.config import DataConfig
from cover.data.prepare import foreground_positions, prepare
from cover.data.reading import from_volumes, read
from cover.data.report import ImageError
from cover.data.store import Chunked, load, require, save

_FORMAT = 2  # to be raised when entries of earlier versions must not be read
_SETTINGS = ("in_channels", "spacing", "slice_axis", "volumes", "max_voxels", "normalise", "percentiles", "store")
_CHUNK = 32  # voxels along each axis that are compressed at a time; of slices, one
_ABANDONED = 3600.0  # seconds after which a temporary file has lost its writer


@dataclass
class Entry:
    """What is known of one file.

    Attributes:
        key: names its volumes in the cache.
        count: number of images in the file, usable or not.
        volumes: the usable ones.
        slices: for each usable one, the slices that are not constant; empty unless `slice_axis` is set.
        spacing: mm per axis, None where unknown.
        problems, notes: (volume, what) of what cannot be used and of what was repaired.
        sizes: bytes of each cached file, by name.
    """

    key: str
    count: int = 1
    volumes: list[int] = field(default_factory=list)
    slices: list[list[int]] = field(default_factory=list)
    spacing: tuple[float, ...] | None = None
    problems: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


class Cache:
    """A folder of decoded volumes; created if it does not exist.

    Args:
        folder: where it is.
        store: how volumes are kept, see `cover.data.store`.

    Raises:
        ImportError: the store needs an extra that is not installed.
    """

    def __init__(self, folder: Path, store: str = "npy"):
        require(store)
        self.folder, self.store = Path(folder), store
        self.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self.folder.glob("*.tmp"):
            try:
                if time.time() - abandoned.stat().st_mtime > _ABANDONED:
                    abandoned.unlink()
            except FileNotFoundError:  # its writer, or another process that tidies up, was faster
                pass
        self._entries: dict[str, Entry] = {}
        if self._index.exists():
            for line in self._index.read_bytes().splitlines():
                try:
                    entry = Entry(**json.loads(line))
                except (ValueError, TypeError):  # cut off by the death of its writer
                    continue
                entry.spacing = entry.spacing and tuple(entry.spacing)
                self._entries[entry.key] = entry

    def __getstate__(self) -> dict:
        # a worker process needs no more than the folder: its images carry their own entries
        return {**self.__dict__, "_entries": {}}

    @property
    def _index(self) -> Path:
        return self.folder / "index.jsonl"

    def get(self, key: str) -> Entry | None:
        """The entry of a key, if all its files are there."""
        entry = self._entries.get(key)
        try:
            complete = entry and all((self.folder / n).stat().st_size == size for n, size in entry.sizes.items())
        except FileNotFoundError:
            return None
        return entry if complete else None

    def forget(self, entry: Entry) -> None:
        """Have an entry made again, whose files are of the size that the index says and yet cannot be read."""
        self._entries.pop(entry.key, None)

    def put(self, entry: Entry) -> None:
        """Add an entry whose files are in place."""
        # a line break first: the line of a writer that was killed must not swallow this one
        line = f"\n{json.dumps(dataclasses.asdict(entry))}\n".encode()
        with self._index.open("ab", buffering=0) as file:
            file.write(line)
        self._entries[entry.key] = entry

    def write(self, name: str, array: np.ndarray, chunk: tuple[int, ...]) -> int:
        """Write an array; returns the size of its file in bytes. OSError where the disk is full."""
        temporary = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                save(file, array, self.store, chunk)
                file.flush()
                os.fsync(file.fileno())
            size = temporary.stat().st_size
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        return size

    def volume(self, entry: Entry, volume: int) -> np.ndarray | Chunked:
        """A cached volume, float16 [in_channels, *S], read-only and memory-mapped.

        It is opened anew each time, which costs 0.1 to 0.2 ms and leaves nothing behind in memory.
        """
        return load(self.folder / _volume_name(entry.key, volume), self.store)

    def foreground(self, entry: Entry, volume: int) -> np.ndarray:
        """Positions of its foreground, int32 [4096, 3]."""
        return load(self.folder / _foreground_name(entry.key, volume), self.store)[:]


def examine(path: Path, config: DataConfig, cache: Cache | None = None) -> Entry:
    """Read a file once and say what can be used of it; with a cache, volumes end up there. Never raises ImageError."""
    try:
        key = key_of(path, config)
    except FileNotFoundError:
        return Entry(key="", problems=[(0, "no such file")])
    except (OSError, ValueError) as error:  # ValueError: its path has a NUL, or what the system cannot encode
        return Entry(key="", problems=[(0, f"cannot be looked at: {error}")])
    if cache is not None and (known := cache.get(key)):
        return known
    entry = Entry(key)
    try:
        decoded = read(path, config)
    except ImageError as error:
        entry.problems.append((0, str(error)))
        return entry
    entry.count, entry.spacing = len(decoded.array), decoded.spacing
    for volume, array in enumerate(decoded.array):
        content = {}
        try:
            image, note = prepare(array, decoded.spacing, config)
            if cache is not None and from_volumes(config):
                # half precision: 0.05 % of a standard deviation near 1, far below any noise, at half the space
                chunk = (1, *[_CHUNK] * 3) if config.slice_axis is None else (1, 1, *image.shape[2:])
                content[_volume_name(key, volume)] = image.astype(np.float16), chunk
                positions = foreground_positions(image)
                content[_foreground_name(key, volume)] = positions, positions.shape
        except (ImageError, MemoryError) as error:
            entry.problems.append((volume, str(error)))
            continue
        entry.volumes.append(volume)
        if note:
            entry.notes.append((volume, note))
        if config.slice_axis is not None:
            flat = image.swapaxes(0, 1).reshape(image.shape[1], -1)
            entry.slices.append(np.flatnonzero(flat.min(1) < flat.max(1)).tolist())
        entry.sizes |= {name: cache.write(name, *stored) for name, stored in content.items()}
    # what failed is tried again by the next run: the cause may have been the disk or the network
    if cache is not None and not entry.problems:
        cache.put(entry)
    return entry


def key_of(path: Path, config: DataConfig) -> str:
    """Names what a file holds, as far as can be told without reading it: another content has another key."""
    status = path.stat()
    settings = [len(config.crop), config.hounsfield if config.normalise == "hounsfield" else None]
    settings += [getattr(config, name) for name in _SETTINGS]
    identity = [_FORMAT, os.path.abspath(path), status.st_mtime_ns, status.st_size, settings]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _volume_name(key: str, volume: int) -> str:
    return f"{key}-{volume}.volume"


def _foreground_name(key: str, volume: int) -> str:
    return f"{key}-{volume}.foreground"
