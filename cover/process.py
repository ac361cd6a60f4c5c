"""A training process and its machine: signals that ask it to stop, and the memory that it takes, and keeps."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm and others announce a pre-emption by SIGUSR1


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and did after saving itself; `signal` is the number of the signal that asked."""

    def __init__(self, received: int, message: str):
        super().__init__(message)
        self.signal = received


class StopSignals:
    """Inside the `with` block, the first Ctrl-C, SIGTERM or SIGUSR1 is noted in `received`; then Ctrl-C acts as ever.

    SIGTERM and SIGUSR1 may come twice without anybody insisting: from Slurm to all processes, and again from torchrun.
    In a thread other than the main one, where signals never arrive, it does nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _STOP}
        return self

    def __exit__(self, *exception) -> None:
        for number in self._before:
            self._restore(number)

    def _note(self, number: int, frame) -> None:
        if self.received is None:
            self.received = number
            print("\nsaving after this step; Ctrl-C to stop at once", file=sys.stderr)
            self._restore(signal.SIGINT)

    def _restore(self, number: int) -> None:
        handler = self._before[number]
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_signals(worker: int) -> None:
    """For data-loading workers: the terminal sends Ctrl-C to them too, but it is the main process that ends them."""
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def keeping_freed_memory(wanted: bool) -> Iterator[None]:
    """Within the block, memory that is freed stays with the process: docs/training.md has what it gives and takes.

    Tensors of megabytes are else new to the process in every step, and the system clears their pages first. It is a
    setting of glibc's malloc; where there is another one, or the environment has settings for it, nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    given = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not wanted or given or set_option is None:
        yield
        return
    trim_threshold, map_threshold = -1, -3  # their numbers in malloc.h
    for option in (trim_threshold, map_threshold):
        set_option(option, 2**31 - 1)
    try:
        yield
    finally:
        # what they come to by themselves in a process that has freed large blocks
        set_option(map_threshold, 32 * 2**20)
        set_option(trim_threshold, 64 * 2**20)
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """The most memory taken so far, in bytes: of tensors on a CUDA device, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(
        OSError
    ):  # Linux: what getrusage says begins at the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
