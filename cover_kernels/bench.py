"""python -m cover_kernels.bench: what an operator reaches here at sizes of your own, and what bounds it.

    python -m cover_kernels.bench --shape 1x8x384x384 --window 7
    python -m cover_kernels.bench --shape 1x32x48x48x48 --window 5 --heads 4 --dtype bfloat16
    python -m cover_kernels.bench warp --shape 1x32x64x64x64 --stride 2 --device cuda

The floor of a pass is the larger of two times: of its arithmetic at the measured rate of multiply-adds (for veu with
the 4 that its softmax takes at least for each exponential), and of reading and writing every tensor once at the
measured rate of a copy. Each takes seconds; whether results are right is what `python -m cover_kernels` tests.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from cover_kernels.checks import DTYPES
from cover_kernels.measure import Peaks, machine, measure_peaks, one_pass, peak_above, synchronised, times
from cover_kernels.problems import BOTH, FORWARD, PASSES, SOFTMAX, Compose, Problem, Veu, Warp, Work


def floors(work: Work, peaks: Peaks) -> dict[str, float]:
    """What a call has to do -> seconds that it takes at least on a machine of these peaks."""
    return {
        "multiply-adds": work.flops / peaks.flops,
        "softmax": 2 * SOFTMAX * work.exponentials / peaks.flops,
        "memory": work.bytes / peaks.copy,
    }


def verdict(work: Work, peaks: Peaks, seconds: float) -> str:
    """What bounds a call that took so many seconds, and how near it is to that bound."""
    least = floors(work, peaks)
    arithmetic = least["multiply-adds"] + least["softmax"]
    bound = max(arithmetic, least["memory"])
    parts = ", ".join(f"{name} {1e3 * floor:.3f} ms" for name, floor in least.items() if floor)
    larger = "arithmetic" if arithmetic > least["memory"] else "memory"
    if not work.pairs and bound < 0.5 * seconds:
        # interpolation multiplies every corner of a cell once
        loads = work.flops / 2 / seconds / 1e9
        return f"at least {parts}: neither bounds it but the loads of the cells' corners, {loads:.2f} G/s"
    return f"at least {parts}: {larger} bounds it, {bound / seconds:.0%} of that bound reached"


def parse(arguments: Sequence[str] | None) -> tuple[Problem, str]:
    """The problem and the device that a command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m cover_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("operator", nargs="?", choices=("veu", "warp", "compose"), default="veu")
    parser.add_argument("--shape", required=True, help="of q, of the image or of the residual, such as 1x8x384x384")
    parser.add_argument("--window", type=int, help="N (veu; default 7)")
    parser.add_argument("--heads", type=int, help="J (veu; default 1)")
    parser.add_argument("--stride", type=int, help="how many times coarser the flow is (warp, compose; default 1)")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    try:
        B, channels, *S = map(int, options.shape.replace(",", "x").split("x"))
    except ValueError:
        parser.error(f"--shape must be sizes such as 1x8x384x384, got {options.shape!r}")
    S, dtype = tuple(S), getattr(torch, options.dtype)
    if len(S) not in (2, 3) or min(B, channels, *S) < 1:
        parser.error(f"--shape must be BxCxHxW or BxCxDxHxW, all above 0, got {options.shape!r}")
    if not options.device.startswith(("cpu", "cuda")):
        parser.error(f"--device must be cpu, cuda or cuda:1 .., got {options.device!r}")
    for name in ("stride",) if options.operator == "veu" else ("window", "heads"):
        if getattr(options, name) is not None:
            parser.error(f"--{name}: {options.operator} has none")
    window = 7 if options.window is None else options.window
    heads, stride = (1 if x is None else x for x in (options.heads, options.stride))
    if options.operator == "veu":
        if not (0 < window < 2**31 and window % 2):
            parser.error(f"--window must be odd, above 0 and below 2**31, got {window}")
        if heads < 1 or channels % heads:
            parser.error(f"--heads must divide the {channels} channels, got {heads}")
        return Veu(S, window, channels // heads, heads, B, dtype), options.device
    if stride < 1 or any(n % stride for n in S):
        parser.error(f"--stride must divide {S}, got {stride}")
    if options.operator == "warp":
        return Warp(S, channels, stride, B, dtype), options.device
    if channels != len(S):
        parser.error(f"--shape of compose must have {len(S)} channels, one per axis, got {channels}")
    return Compose(S, stride, B, dtype), options.device


def main(arguments: Sequence[str] | None = None) -> int:
    problem, device = parse(arguments)
    try:
        tensors = problem.tensors(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # a device, or memory, that is not there
        print(f"{problem} on {device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    here, peaks = machine(device), measure_peaks(device, problem.dtype)
    print(f"{problem}" + (f", {problem.work(FORWARD).pairs / 1e6:.2f} M pairs" if isinstance(problem, Veu) else ""))
    print(f"{here['device']}, {here['threads']} threads, torch {here['torch']}, {here['backend']}")
    print(f"measured now: {peaks.flops / 1e9:.0f} GFLOP/s ({peaks.source}), {peaks.copy / 1e9:.1f} GB/s (copy)\n")
    for which in PASSES:
        call = synchronised(one_pass(problem, tensors, which), device)
        taken = times(call)
        low, median, high = statistics.quantiles(taken, n=4)
        work, memory = problem.work(which), peak_above(call, device)[0]
        pairs = f", {work.pairs / median / 1e9:.3g} G pairs/s" if work.pairs else ""
        flops, rate = work.flops / median, work.bytes / median
        print(
            f"{which:{len(BOTH)}} {1e3 * median:9.3f} ms (quartiles {1e3 * low:.3f} to {1e3 * high:.3f}, "
            f"{len(taken)} calls){pairs}, {flops / 1e9:.1f} GFLOP/s ({flops / peaks.flops:.0%} of peak), "
            f"{rate / 1e9:.1f} GB/s ({rate / peaks.copy:.0%} of a copy), peak {memory / 2**20:.1f} MiB\n"
            f"{'':{len(BOTH)}} {verdict(work, peaks, median)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
