"""Where the images of a data set are: a folder, a file, a list of files, or a CSV, JSON or text manifest."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
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
    times: int = 1  # how often the data set has it


def find(data: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Source]:
    """The files of a data set, each once, in a fixed order; not opened, nor need they exist where a list names them.

    Args:
        data: a folder (searched recursively for known suffixes, links followed, hidden files and the folders of runs
            left out), an image, a list of images, or a manifest: a CSV file with a column `image` and optionally
            `split`, a JSON list of paths or of objects with these two keys, or a text file (.txt) with a path on each
            line. Other columns are ignored. Paths are relative to the manifest.

    Raises:
        FileNotFoundError: `data` does not exist. DataError: the manifest is not as described, or has one file in two
        splits.
    """
    if not isinstance(data, str | os.PathLike):
        return _once(Source(str(path), Path(path)) for path in data)
    path = Path(data)
    if not os.fspath(data) or not path.exists():
        raise FileNotFoundError(f"data: there is no file or folder {os.fspath(data)!r}")
    if path.is_dir():
        return _once(_search(path))
    if path.suffix.lower() in (".csv", ".json", ".txt"):
        if not path.is_file():  # opening a pipe would wait for a writer, and a device need not end
            raise DataError(f"manifest {path}: is a pipe, a socket or a device; expected a file")
        return _once(_read_manifest(path))
    return [Source(path.name, path)]


def splits(data: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str, ...]:
    """The splits that a manifest distinguishes, in the order train, val, test; empty for anything without them."""
    found = {source.split for source in find(data)}
    return tuple(split for split in SPLITS if split in found)


def _search(folder: Path) -> list[Source]:
    found, seen = [], set()
    # a folder that cannot be looked into is listed itself: reading it will say why
    for root, folders, names in os.walk(folder, onerror=lambda e: found.append(Path(e.filename)), followlinks=True):
        real = os.path.realpath(root)
        holds_run = "config.json" in names and ("metrics.jsonl" in names or "checkpoints" in folders)
        if real in seen or (holds_run and Path(root) != folder):  # seen: links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found.extend(Path(root, name) for name in names)
    relative = sorted(path.relative_to(folder) for path in found)
    return [Source(r.as_posix(), folder / r) for r in relative]


def _once(sources: Iterable[Source]) -> list[Source]:
    """Every file once, where it comes first: a repeat could be trained on and held out at once."""
    found: dict[str, Source] = {}
    for source in sources:
        try:
            file = os.path.realpath(source.path)
        except ValueError:  # a NUL, or what the system cannot encode; looking at the file will say so
            file = str(source.path)
        first = found.setdefault(file, source._replace(times=0))
        if first.split != source.split:
            both = f"{first.name!r} ({first.split}) and {source.name!r} ({source.split})"
            raise DataError(f"data: one file is in two splits: {both}")
        found[file] = first._replace(times=first.times + 1)
    return list(found.values())


def _rows(path: Path) -> Any:
    suffix = path.suffix.lower()
    with path.open(newline="", encoding="utf-8-sig") as file:
        if suffix == ".json":
            return json.load(file)
        if suffix == ".txt":
            return [line for line in map(str.rstrip, file) if line]
        table = csv.DictReader(file)
        if "image" not in (table.fieldnames or ()):
            raise ValueError(f"expected a header with a column `image`, got the columns {table.fieldnames or []}")
        return list(table)


def _read_manifest(path: Path) -> list[Source]:
    try:
        rows = _rows(path)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"manifest {path}: cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"manifest {path}: expected a JSON list, got {type(rows).__name__}")
    rows = [{"image": row} if isinstance(row, str) else row for row in rows]
    with_split = any(isinstance(row, dict) and "split" in row for row in rows)
    names = {name for row in rows if isinstance(row, dict) for name in row if isinstance(name, str)}
    if not with_split and (near := [name for name in names if name.strip().lower() == "split"]):
        raise DataError(f"manifest {path}: the column of splits must be called `split`, got {near[0]!r}")
    sources = []
    for number, row in enumerate(rows, 1):
        image = row.get("image") if isinstance(row, dict) else row
        if not isinstance(image, str) or not image:
            raise DataError(f"manifest {path}, entry {number}: expected a path as `image`, got {image!r}")
        split = row.get("split")
        if with_split and split not in SPLITS:
            raise DataError(f"manifest {path}, entry {number}: `split` must be one of {SPLITS}, got {split!r}")
        sources.append(Source(image, path.parent / image, split))
    return sources
