"""What was found in a data set: which files cannot be used and why, what was repaired, how large the cache is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class DataError(ValueError):
    """A data set that cannot be used as asked: nothing to train on, a bad manifest, or `on_error="fail"`."""


class ImageError(DataError):
    """One image that cannot be used; the message says why, without naming the file."""


@contextmanager
def image_errors(failure: str) -> Iterator[None]:
    """Makes any exception an ImageError, `failure` before its type and message; ImportError (a missing extra) passes.

    One file must not end the look at all others, and decoders raise whatever a damaged file makes them trip over.
    """
    try:
        yield
    except (ImageError, ImportError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise ImageError(f"{failure}: {type(error).__name__}: {message}") from error


def printable(text: str) -> str:
    """`text` on one line: what a terminal obeys (line breaks, escapes) or UTF-8 lacks is escaped as in `ascii`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Finding(NamedTuple):
    """One row of a report."""

    name: str
    what: str


@dataclass(frozen=True)
class Report:
    """The outcome of reading every file of a data set once; `print` shows it as one table.

    Attributes:
        files: number of files looked at.
        images: number of usable images, volumes or slices in them.
        problems: what cannot be used (left out of the data set).
        notes: what was repaired and is used.
        spacings: the voxel sizes that occur, mm per axis in canonical order.
        cache: the folder of decoded volumes, None where nothing is cached.
        cache_bytes: size of this data set in that folder.
    """

    files: int
    images: int
    problems: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    spacings: tuple[tuple[float, ...], ...] = ()
    cache: str | None = None
    cache_bytes: int = 0

    def __str__(self) -> str:
        lines = [f"{self.files} files, {self.images} usable images, {len(self.problems)} problems"]
        lines += _table("problem", self.problems) + _table("note", self.notes)
        if self.spacings:
            smallest, largest = (" x ".join(f"{size:.3g}" for size in spacing) for spacing in _range(self.spacings))
            lines.append(f"voxel size: {smallest}" + (f" to {largest}" if largest != smallest else "") + " mm")
        if self.cache is not None:
            lines.append(f"cache: {self.cache_bytes / 1e6:.1f} MB in {printable(self.cache)}")
        return "\n".join(lines)

    def summary(self, most: int = 10) -> str:
        """The problems as one table of at most `most` rows."""
        more = len(self.problems) - most
        rest = [f"... and {more} more: `cover check` lists all"] if more > 0 else []
        return "\n".join(_table("problem", self.problems[:most]) + rest)


def _range(spacings: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    axes = list(zip(*spacings, strict=True))
    return tuple(map(min, axes)), tuple(map(max, axes))


def _table(title: str, rows: tuple[Finding, ...]) -> list[str]:
    if not rows:
        return []
    cells = [("file", title), *((printable(row.name), printable(row.what)) for row in rows)]
    width = max(len(name) for name, _ in cells)
    return [f"{name:<{width}}  {what}" for name, what in cells]
