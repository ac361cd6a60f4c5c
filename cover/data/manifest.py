"""Where the images of a data set are: a folder, a file, a list of files, or a CSV, JSON or text manifest."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cover.data.reading import SUFFIXES
from cover.data.report import DataError

SPLITS = ("train", "val", "test")


class Source(NamedTuple):
    """One file: its name in reports, its path, and its split where a manifest gives one."""

    name: str
    path: Path
    split: str | None = None


def find(data: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Source]:
    """The files of a data set, in a fixed order. They are not opened, nor need they exist where a list names them.

    Args:
        data: a folder (searched recursively for known suffixes, hidden files left out), an image, a list of images,
            or a manifest: a CSV file with a column `image` and optionally `split`, a JSON list of paths or of
            objects with these two keys, or a text file (.txt) with a path on each line. Other columns are ignored.
            Paths are relative to the manifest.

    Raises:
        FileNotFoundError: `data` does not exist. DataError: the manifest is not as described.
    """
    if not isinstance(data, str | os.PathLike):
        return [Source(str(path), Path(path)) for path in data]
    path = Path(data)
    if path.is_dir():
        files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
        relative = sorted(file.relative_to(path) for file in files if file.name.lower().endswith(SUFFIXES))
        return [Source(r.as_posix(), path / r) for r in relative if not any(part.startswith(".") for part in r.parts)]
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file or folder {str(path)!r}")
    if path.suffix.lower() in (".csv", ".json", ".txt"):
        return _read_manifest(path)
    return [Source(path.name, path)]


def splits(data: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str, ...]:
    """The splits that a manifest distinguishes, in the order train, val, test; empty for anything without them."""
    found = {source.split for source in find(data)}
    return tuple(split for split in SPLITS if split in found)


def _rows(path: Path) -> Any:
    suffix = path.suffix.lower()
    with path.open(newline="", encoding="utf-8-sig") as file:
        if suffix == ".json":
            return json.load(file)
        return list(csv.DictReader(file)) if suffix == ".csv" else list(filter(None, file.read().splitlines()))


def _read_manifest(path: Path) -> list[Source]:
    try:
        rows = _rows(path)
    except (ValueError, csv.Error) as error:
        raise DataError(f"manifest {path}: cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"manifest {path}: expected a JSON list, got {type(rows).__name__}")
    rows = [{"image": row} if isinstance(row, str) else row for row in rows]
    with_split = any(isinstance(row, dict) and "split" in row for row in rows)
    sources = []
    for number, row in enumerate(rows, 1):
        image = row.get("image") if isinstance(row, dict) else None
        if not isinstance(image, str) or not image:
            raise DataError(f"manifest {path}, entry {number}: expected a path as `image`, got {image!r}")
        split = row.get("split")
        if with_split and split not in SPLITS:
            raise DataError(f"manifest {path}, entry {number}: `split` must be one of {SPLITS}, got {split!r}")
        sources.append(Source(image, path.parent / image, split))
    return sources
