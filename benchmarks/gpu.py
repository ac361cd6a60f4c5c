"""One command for the day a GPU is there: tests, compute-sanitizer and the throughput of VEU beside its peers.

    python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu --quick      the same from end to end, in small, without a GPU

First the operators' tests run on the device, then compute-sanitizer's tools on the self-test where it is installed; if
something fails, nothing is timed. Each peer is timed only after it agrees with the reference. A pair is a query and a
key inside its window, of one group; it counts 2 C floating-point operations in the forward, and three times as many in
the backward (its score again, grad_q, grad_k), everything else none. GB/s counts each tensor once that a pass must read
or write.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

import cover_kernels
from cover_kernels import reference
from cover_kernels.backends import choose, devices

TESTS = Path(__file__).parent.parent / "tests"
TEST_FILES = ("test_operators.py", "test_veu.py", "test_warp.py", "test_compose.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Problem:
    S: tuple[int, ...]
    window: int
    heads: int = 1
    channels: int = 8  # of one group
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self):
        shape = "x".join(map(str, (self.batch, self.heads * self.channels, *self.S)))
        return f"{shape} N={self.window} J={self.heads} {str(self.dtype).removeprefix('torch.')}"

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key, the key inside the window and the image, over all groups."""
        r = self.window // 2
        along = (sum(min(p + r, n - 1) - max(p - r, 0) + 1 for p in range(n)) for n in self.S)
        return self.batch * self.heads * prod(along)

    def tensors(self, device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.heads * self.channels, *self.S)
        return [torch.randn(shape, generator=generator).to(device, self.dtype).requires_grad_() for _ in range(2)]

    def bytes(self, backward: bool) -> int:
        features = 2 * self.batch * self.heads * self.channels * prod(self.S) * self.dtype.itemsize
        vectors = self.batch * len(self.S) * prod(self.S) * 4
        return (3 * features + 3 * vectors) if backward else features + vectors


FULL = [
    Problem((384, 384), 7, batch=24),
    Problem((384, 384), 7, batch=24, dtype=torch.bfloat16),
    Problem((96, 96), 7, heads=4, batch=24),
    Problem((384, 384), 7, channels=32, batch=8),
    Problem((96, 96, 96), 5, batch=2),
    Problem((96, 96, 96), 5, batch=2, dtype=torch.bfloat16),
    Problem((96, 96, 96), 7, batch=1),
]
QUICK = [Problem((24, 32), 7, heads=2), Problem((8, 10, 12), 5)]


def eager(problem: Problem):
    """The reference's forward, differentiated by autograd: what one writes in plain PyTorch."""
    window, scale = [problem.window] * len(problem.S), problem.channels**-0.5
    return lambda q, k: reference.veu_fwd(q, k, window, problem.heads, scale, None)[0]


def flex_attention(problem: Problem, device: str):
    """FlexAttention with the keys' coordinates as values, masked to the window; p is subtracted from the result."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    S, r, n = problem.S, problem.window // 2, prod(problem.S)
    # head widths are powers of two from 16 on
    width = max(16, 1 << (problem.channels - 1).bit_length())

    def near(b, h, query, key):
        inside = True
        for size in reversed(S):
            inside = inside & ((query % size - key % size).abs() <= r)
            query, key = query // size, key // size
        return inside

    axes = torch.meshgrid(*[torch.arange(size, device=device, dtype=torch.float32) for size in S], indexing="ij")
    position = torch.stack(axes, -1).view(1, 1, n, len(S))
    block_mask = create_block_mask(near, None, None, n, n, device=device, _compile=device != "cpu")
    attention = torch.compile(flex_attention) if device != "cpu" else flex_attention

    def tokens(x):
        x = x.unflatten(1, (problem.heads, problem.channels)).flatten(3).transpose(2, 3)
        return torch.nn.functional.pad(x, (0, width - problem.channels))

    def veu(q, k):
        values = torch.nn.functional.pad(position, (0, width - len(S))).to(q.dtype)
        values = values.expand(problem.batch, problem.heads, -1, -1)
        found = attention(tokens(q), tokens(k), values, block_mask=block_mask, scale=problem.channels**-0.5)
        moved = found[..., : len(S)].float() - position
        return moved.mean(1).transpose(1, 2).unflatten(2, S)

    return veu


def peers(problem: Problem, device: str) -> dict:
    """Name -> function of q and k, or the reason why that peer is not timed."""
    ours = lambda q, k: cover_kernels.veu(q, k, problem.window, problem.heads)  # noqa: E731
    on_gpu = device != "cpu"
    natten = "installed" if importlib.util.find_spec("natten") else "not installed"
    return {
        "cover": ours,
        "eager": eager(problem),
        "torch.compile": torch.compile(eager(problem))
        if on_gpu
        else "left out on CPUs, where compiling takes longer than all else here",
        # the CPU's compiled one would take longer to compile than to time
        "FlexAttention" if on_gpu else "Flex, uncompiled": flex_attention(problem, device)
        if problem.dtype == torch.float32
        else "coordinates as values need float32",
        "NATTEN": f"its windows shift at the border instead of being masked, another result there ({natten})",
    }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds(call, device: str, rounds: int) -> tuple[float, float]:
    """(median, interquartile range) of the time of a call, after two calls that are not counted."""
    times = []
    for i in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    first, _, third = statistics.quantiles(times, n=4)
    return statistics.median(times), third - first


def measured_peaks(device: str, quick: bool) -> tuple[float, float]:
    """(float32 floating-point operations in a second of a matrix product, bytes in a second of a copy)."""
    n = 256 if quick else 8192
    a, b = torch.randn(2, n, n, device=device)
    product, _ = seconds(lambda: a @ b, device, 5)
    x = torch.empty((1 << 20) if quick else (1 << 28), device=device)
    y = torch.empty_like(x)
    copy, _ = seconds(lambda: y.copy_(x), device, 5)
    return 2 * n**3 / product, 2 * x.nbytes / copy


def measure(problem: Problem, device: str, backward: bool, rounds: int, peak: tuple[float, float]) -> None:
    """Print one problem's row for every peer."""
    print(f"\nveu {problem}, {'forward + backward' if backward else 'forward'}, {problem.pairs / 1e6:.1f} M pairs")
    q, k = problem.tensors(device)
    with torch.no_grad():
        exact = eager(problem)(q.double(), k.double())
    grad = torch.ones_like(exact, dtype=torch.float32)
    base = None
    for name, function in peers(problem, device).items():
        if isinstance(function, str):
            print(f"  {name:14} not timed: {function}")
            continue

        def call(function=function):
            if not backward:
                with torch.no_grad():
                    return function(q, k)
            return torch.autograd.grad(function(q, k), (q, k), grad)

        try:
            with torch.no_grad():
                error = (function(q, k).double() - exact).abs().max().item()
            if not error <= 0.05:
                print(f"  {name:14} not timed: differs from the reference in float64 by {error:.2g} voxels")
                continue
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            took, spread = seconds(call, device, rounds)
        except (RuntimeError, NotImplementedError) as failure:  # out of memory, or a backward that a peer lacks
            print(f"  {name:14} failed: {str(failure).strip().splitlines()[0]}")
            continue
        base = base or took
        memory = (
            "" if device == "cpu" else f", peak {(torch.cuda.max_memory_allocated(device) - before) / 2**20:.0f} MiB"
        )
        flops, rate = problem.pairs * 2 * problem.channels * (4 if backward else 1), problem.bytes(backward) / took
        print(
            f"  {name:14} {1e3 * took:9.3f} ms (+- {1e3 * spread:.3f}), {problem.pairs / took / 1e9:7.2f} G pairs/s, "
            f"{flops / took / 1e12:6.3f} TFLOP/s ({flops / took / peak[0]:.1%} of peak), {rate / 1e9:6.1f} GB/s "
            f"({rate / peak[1]:.1%}){memory}, {took / base:.1f} times the time of cover"
        )


def run_tests(device: str, quick: bool) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", *TEST_FILES]
    if quick:
        command += ["-k", "agrees_with_reference and float32"]
    return not subprocess.run(command, cwd=TESTS, env={**os.environ, "COVER_TEST_DEVICE": device}).returncode


def run_sanitizers(device: str) -> bool:
    """compute-sanitizer on the self-test; True where nothing was found, or where it cannot be run."""
    tool = shutil.which("compute-sanitizer")
    if device == "cpu" or not tool:
        print(f"compute-sanitizer: not run, {'the device is the CPU' if device == 'cpu' else 'it is not on the PATH'}")
        return True
    passed = True
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, "-m", "cover_kernels"]
        clean = subprocess.run(command).returncode == 0
        print(f"compute-sanitizer {name}: {'nothing found' if clean else 'FAILED'}")
        passed &= clean
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help='"cuda" or "cpu"')
    parser.add_argument("--quick", action="store_true", help="few tests, small problems: does all of it run?")
    parser.add_argument("--only-time", action="store_true", help="no tests and no sanitizers")
    arguments = parser.parse_args()
    device = arguments.device
    if device not in ("cpu", "cuda") or (device == "cuda" and "cuda:0" not in devices()):
        parser.error(f"torch {torch.__version__} has no device {device!r} here")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads")
    print(f"cover_kernels {cover_kernels.__version__}: {' : '.join(choose(device))}")
    if not arguments.only_time and not (run_tests(device, arguments.quick) and run_sanitizers(device)):
        print("something failed: nothing is timed")
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False  # VEU's products are float32 too
    peak = measured_peaks(device, arguments.quick)
    print(f"measured peaks: {peak[0] / 1e12:.2f} TFLOP/s (float32 matrix product), {peak[1] / 1e9:.0f} GB/s (copy)")
    for problem in QUICK if arguments.quick else FULL:
        for backward in (False, True):
            measure(problem, device, backward, 5 if arguments.quick else 30, peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
