"""Throughput of the operators beside plain PyTorch in the same run: `make bench`.

The peer of `veu` is the reference, an eager loop over the window's offsets; the peer of `warp` builds a sampling grid
and calls torch.nn.functional.grid_sample. Each row is timed only after both agree. The last test prints the ratios of
the medians, with the machine, the threads and the versions.
"""

import platform
import statistics

import pytest
import torch
import torch.nn.functional as F

import cover_kernels

VEU = {
    "2D 1x8x384x384 N=7": (8, 1, (384, 384), 7),
    "3D 1x8x48x48x48 N=5": (8, 1, (48, 48, 48), 5),
    "2D 1x32x24x24 N=7 J=4": (8, 4, (24, 24), 7),
}
WARP = {
    "2D 1x32x384x384": (32, (384, 384)),
    "3D 1x32x64x64x64": (32, (64, 64, 64)),
    "3D 1x8x96x96x96": (8, (96, 96, 96)),
}
PASSES = ("forward", "forward + backward")
ROWS = [("veu", name, which) for name in VEU for which in PASSES]
ROWS += [("warp", name, which) for name in WARP for which in PASSES]
medians: dict[tuple, float] = {}


def veu_problem(channels, heads, S, window):
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads * channels, *S, requires_grad=True) for _ in range(2))
    return lambda: cover_kernels.veu(q, k, window, heads), (q, k)


def grid_sample(x, flow):
    """What one writes by hand: positions in grid_sample's own coordinates, then the sampler."""
    S = x.shape[2:]
    axes = torch.meshgrid(*[torch.arange(n, dtype=flow.dtype) for n in S], indexing="ij")
    size = torch.tensor(S, dtype=flow.dtype).view(-1, *[1] * len(S))
    grid = ((torch.stack(axes) + flow + 0.5) * 2 / size - 1).flip(1).movedim(1, -1)
    return F.grid_sample(x, grid, align_corners=False)


def warp_problem(channels, S):
    """Features and a smooth flow of some voxels."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, *S, requires_grad=True)
    coarse = 3 * torch.randn(1, len(S), *(n // 16 for n in S))
    flow = F.interpolate(coarse, size=S, mode="bilinear" if len(S) == 2 else "trilinear").requires_grad_()
    return (lambda: cover_kernels.warp(x, flow)), (lambda: grid_sample(x, flow)), (x, flow)


def calls(operator, name):
    """(ours, the peer, the differentiable tensors)."""
    if operator == "warp":
        return warp_problem(*WARP[name])
    call, leaves = veu_problem(*VEU[name])

    def peer():
        with cover_kernels.use_backend("reference"):
            return call()

    return call, peer, leaves


def timed(call, leaves, which):
    if which == "forward":
        with torch.no_grad():
            return call()
    y = call()
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("who", ["cover", "eager"])
@pytest.mark.parametrize(("operator", "name", "which"), ROWS)
def test_operator(benchmark, operator, name, which, who):
    ours, peer, leaves = calls(operator, name)
    torch.testing.assert_close(ours(), peer(), atol=1e-3, rtol=1e-3)
    call = ours if who == "cover" else peer

    def step():
        # the reference's backward must run on the reference too
        with cover_kernels.use_backend("reference" if operator == "veu" and who == "eager" else None):
            timed(call, leaves, which)

    step()
    benchmark.pedantic(step, rounds=15 if who == "cover" else 5)
    medians[operator, name, which, who] = statistics.median(benchmark.stats.stats.data)


def test_ratios_of_the_medians(capsys):
    with capsys.disabled():
        machine = platform.processor() or platform.machine()
        print(f"\n\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"cover_kernels {cover_kernels.__version__}: {cover_kernels.backend_info()['cpu']['reason']}")
        for operator, name, which in ROWS:
            pair = [medians.get((operator, name, which, who)) for who in ("cover", "eager")]
            if all(pair):
                ours, eager = (1e3 * seconds for seconds in pair)
                print(f"{operator:5} {name:24} {which:19} {ours:8.2f} ms  eager {eager:8.2f} ms  {eager / ours:5.1f}x")
