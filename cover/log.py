"""What a run tells: metrics.jsonl (every record), log.txt, the terminal and, when asked, TensorBoard."""

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from cover.checkpoint import atomic


class RunInUse(RuntimeError):
    """Another process trains in the folder of this run."""


def lock(out: Path) -> TextIO:
    """The log.txt of the run in the folder `out`, which is this process's own until the file is closed.

    Raises RunInUse while it is another's.
    """
    out.mkdir(parents=True, exist_ok=True)
    # opened once: whoever closes a file gives up all locks that his process has on it
    text = open(out / "log.txt", "a+", encoding="utf-8")  # noqa: SIM115 - closed by the log
    try:
        # of this process alone: workers that outlive a killed run do not keep it from being resumed
        fcntl.lockf(text, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        text.close()
        raise RunInUse(f"pretrain: another process is at work on the run in {out}") from error
    return text


class RunLog:
    """Writes the records and messages of a run.

    Args:
        out: the run's folder; the log goes on in `metrics.jsonl`, `log.txt` and `tensorboard/`.
        text: what `lock` gave for this folder.
        step: the step that the run goes on from; records beyond it, left by a run that was killed, are dropped.
        steps: steps of the whole run.
        every: steps between two lines about the progress.
        tensorboard: also write the records for TensorBoard. Raises ImportError where it is not installed.
        stream: the terminal; a progress bar is drawn when it is one, plain lines are written when it is not.
    """

    def __init__(
        self,
        out: Path,
        text: TextIO,
        step: int,
        steps: int,
        every: int,
        tensorboard: bool = False,
        stream: TextIO | None = None,
    ):
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self.first, self.steps, self.every = step, steps, every
        self.began = time.monotonic()
        self.text = text
        size = os.fstat(text.fileno()).st_size
        if size and os.pread(text.fileno(), 1, size - 1) != b"\n":  # a process was killed while it wrote its last line
            text.write("\n")
        self.board = _tensorboard(out / "tensorboard", step) if tensorboard else None
        damaged = truncate(out / "metrics.jsonl", step)
        self.metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        if damaged:
            self.message(f"warning: {damaged} damaged lines of metrics.jsonl are left out")

    def message(self, text: str) -> None:
        """A line for the log and the terminal."""
        text = self._note(text)
        print(("\r\033[K" if self.is_terminal else "") + text, file=self.stream, flush=True)

    def _note(self, text: str) -> str:
        """A line for log.txt; returns it as it can be printed."""
        text = text.encode(errors="surrogateescape").decode(errors="replace")  # file names need not be UTF-8
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.text.flush()
        return text

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """A record for the metrics: `kind` ("train" or "val"), the step and its values."""
        # NaN and infinity are not JSON
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            if self.board and value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Where the run stands after `step`: a bar on a terminal, else a line every so many steps."""
        left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
        words = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"step {step}/{self.steps} {words} {_duration(left)} left"
        due = step % self.every == 0 or step == self.steps
        if self.is_terminal:
            filled = 24 * step // self.steps
            print(f"\r\033[K[{'#' * filled}{'.' * (24 - filled)}] {line}", end="", file=self.stream, flush=True)
            if due:
                self.text.write(line + "\n")
                self.text.flush()
        elif due:
            self.message(line)

    def sync(self) -> None:
        """Returns when every record is on the disk: to be called before a checkpoint that relies on them."""
        os.fsync(self.metrics.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if isinstance(error, Exception):
                self._note(f"stopped by {kind.__name__}: {error}")
            self.metrics.close()
        finally:
            self.text.close()
            if self.board:
                self.board.close()


class NoLog:
    """Stands for the log in all processes of a run but the first: says and keeps nothing."""

    def message(self, text: str) -> None:
        pass

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        pass

    def progress(self, step: int, values: dict[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception) -> None:
        pass


def truncate(path: Path, step: int) -> int:
    """Keep of a metrics.jsonl the whole records up to `step`: later ones will be written again.

    Returns:
        How many lines before the last record that is kept were damaged, and are gone too.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [i for i, line in enumerate(lines) if _is_record(line, step)]
    damaged = kept[-1] + 1 - len(kept) if kept else 0
    if damaged:
        with atomic(path, "wb") as file:
            file.writelines(lines[i] for i in kept)
    else:
        os.truncate(path, sum(map(len, lines[: len(kept)])))
    return damaged


def _is_record(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # a machine that crashed may leave anything behind what was synced
        return False


def read(out: Path, kind: str) -> list[dict]:
    """The records of one kind ("train" or "val") in the metrics of the run in `out`, in order."""
    with open(Path(out) / "metrics.jsonl", encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if record["kind"] == kind]


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'cover-vcl[tensorboard]'") from error
    return SummaryWriter(folder, purge_step=step + 1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
