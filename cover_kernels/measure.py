"""Instruments: the time of a call, the memory it takes at its peak, and what the machine itself can do."""

import contextlib
import ctypes
import gc
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cover_kernels
from cover_kernels.backends import choose
from cover_kernels.problems import BACKWARD, FORWARD

# 12 independent sums hide the latency of a multiply-add, and with their two factors fit into 16 registers
FMA_LOOP = """
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef T Vector __attribute__((vector_size(BYTES)));
extern "C" const long fma_flops = 12 * 2 * BYTES / sizeof(T);  // of one turn of the loop
extern "C" T fma_loop(long turns, T start) {
  Vector x[12], factor = Vector{} + T(0.75), term = Vector{} + start, sum = Vector{};
  for (int i = 0; i < 12; i++) x[i] = Vector{} + T(i);
  for (long turn = 0; turn < turns; turn++)
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) x[i] = x[i] * factor + term;
  for (int i = 0; i < 12; i++) sum += x[i];
  return sum[0];
}
"""


@dataclass(frozen=True)
class Peaks:
    """What the machine reached in this run, on the same threads: bounds for everything else.

    flops: multiply-adds a second, times two. source: how they were measured. copy: bytes read and written a second.
    """

    flops: float
    source: str
    copy: float


def synchronised(call: Callable, device: str) -> Callable:
    """`call`, returning when the device has done it."""
    if torch.device(device).type == "cpu":
        return call

    def function():
        result = call()
        torch.cuda.synchronize(device)
        return result

    return function


def one_pass(function: Callable, tensors: Sequence[Tensor], which: str) -> Callable:
    """A call that makes one pass, of `PASSES`, through a function of tensors that need gradients.

    It returns the output of a forward, else the gradients, for a gradient of the output that is the same in every call.
    """
    if which == FORWARD:
        return torch.no_grad()(lambda: function(*tensors))
    y = function(*tensors)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    if which == BACKWARD:
        return lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True)
    return lambda: torch.autograd.grad(function(*tensors), tensors, grad)


def times(call: Callable, seconds: float = 0.5, least: int = 5, most: int = 200) -> list[float]:
    """Seconds that each of some calls took, after one that is not counted: as many as `seconds` allow."""
    call()
    taken = []
    begun = time.perf_counter()
    while len(taken) < least or (len(taken) < most and time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_above(call: Callable, device: str = "cpu"):
    """(bytes at the peak of `call()` above what was taken before, its result).

    Of the process's resident memory, kernels' own buffers included, on a CPU (Linux only); of torch's on a GPU.
    """
    call()  # what is set up once is not counted
    gc.collect()
    if torch.device(device).type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return torch.cuda.max_memory_allocated(device) - before, result
    with contextlib.suppress(AttributeError):  # glibc alone has it: free memory that it keeps would hide a peak
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _compiled_loop(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loop of multiply-adds for this processor; None where there is no compiler that makes one."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    scalar = "double" if dtype == torch.float64 else "float"
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", f"-DT={scalar}", "-x", "c++", "-"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma.so")
        done = subprocess.run([*command, "-o", library], input=FMA_LOOP, text=True, capture_output=True)
        if done.returncode:
            return None
        loop = ctypes.CDLL(str(library))
    kind = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
    loop.fma_loop.argtypes, loop.fma_loop.restype = (ctypes.c_long, kind), kind
    return loop


def _loop_flops(loop: ctypes.CDLL) -> float:
    """Floating-point operations a second of the loop on as many threads as torch takes."""
    threads, turns = torch.get_num_threads(), 2_000_000
    with ThreadPoolExecutor(threads) as pool:
        # ctypes lets go of Python's lock, so the loops run side by side
        run = lambda: list(pool.map(lambda _: loop.fma_loop(turns, 0.5), range(threads)))  # noqa: E731
        fastest = min(times(run, 0.3, least=7))
    return threads * turns * ctypes.c_long.in_dll(loop, "fma_flops").value / fastest


def measure_peaks(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Peaks:
    """The machine's own speed now: the fastest of some runs, since what disturbs them only slows them down.

    Multiply-adds: on a CPU a loop on registers, where a compiler is at hand, in the type that `dtype` accumulates in;
    elsewhere a matrix product, which stays below what the loop would reach. Copy: of a tensor larger than all caches.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    on_cpu = torch.device(device).type == "cpu"
    loop = _compiled_loop(wide) if on_cpu else None
    if loop:
        flops, source = _loop_flops(loop), "loop of multiply-adds"
    else:
        n = 1024 if on_cpu else 8192
        a, b = torch.randn(2, n, n, device=device, dtype=wide)
        flops = 2 * n**3 / min(times(synchronised(lambda: a @ b, device), least=7))
        source = f"matrix product of {n}x{n}"
    x = torch.zeros((1 << 26) if on_cpu else (1 << 28), device=device)
    y = torch.zeros_like(x)
    copy = 2 * x.nbytes / min(times(synchronised(lambda: y.copy_(x), device), least=5))
    return Peaks(flops, source, copy)


def machine(device: str = "cpu") -> dict:
    """The machine and the versions that a figure belongs to."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type != "cpu":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    backend, reason = choose(device)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cover_kernels": cover_kernels.__version__,
        "backend": f"{backend} ({reason})",
    }
