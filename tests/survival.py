"""What test_survival.py does to a run: a process that writes slowly, and where in its writing it is killed."""

import builtins
import io
import os
import time
from pathlib import Path

import torch

from cover import pretrain

PAUSE = 1e-3  # seconds between two parts of what is written


class SlowFile(io.FileIO):
    """Pauses when half of what it is given is written."""

    def write(self, data) -> int:
        data = memoryview(data)
        half = super().write(data[: len(data) // 2])
        time.sleep(PAUSE)
        return half + super().write(data[half:])


def write_slowly(folder: Path) -> None:
    """From now on, whatever this process writes below `folder` gets there in parts."""
    original = io.open

    def slow(file, mode="r", *arguments, encoding=None, **options):
        if mode not in ("w", "wb", "a", "ab") or isinstance(file, int) or folder not in Path(file).parents:
            return original(file, mode, *arguments, encoding=encoding, **options)
        raw = SlowFile(file, mode[0])
        if options.get("buffering") == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if mode.endswith("b") else io.TextIOWrapper(buffered, encoding=encoding)

    builtins.open = io.open = slow
    Path.open = lambda self, *arguments, **options: slow(self, *arguments, **options)


def train(data: Path, run: Path, settings: dict, slowly: bool = True) -> None:
    """Start or resume a run, on one thread: what a process does that is to be killed."""
    torch.set_num_threads(1)
    if slowly:
        write_slowly(run)
    pretrain(data, out=run, resume=True, **settings)


def half_written(run: Path, what: str) -> set[tuple]:
    """The files of a kind that are not whole, the name of each and when it changed.

    Args:
        what: "volume" (of the cache), "record" (of the metrics), "checkpoint" (or the backbone), or "anywhere": none.
    """
    folders = {"volume": [run / "cache"], "checkpoint": [run / "checkpoints", run]}.get(what, [])
    paths = [path for folder in folders for path in _temporary(folder)]
    paths += [run / "metrics.jsonl"] if what == "record" else []
    found = set()
    for path in paths:
        try:
            if what != "record" or not _ends_with_line(path):
                found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # done meanwhile
            pass
    return found


def _temporary(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder) if name.endswith(".tmp")]
    except FileNotFoundError:
        return []


def _ends_with_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() in (b"", b"\n")
