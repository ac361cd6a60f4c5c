"""More than 2^31 elements: what lies behind them is read and written at the right place.

The inputs are zeros that the system maps without memory; only the outputs take some.
"""

import pytest
import torch

import cover_kernels


def available_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


needs_memory = pytest.mark.skipif(available_memory() < 8e9, reason="needs 8 GB of free memory")


@needs_memory
def test_veu_beyond_31_bits():
    q, k = (torch.zeros(1, 64, 8192, 4100, dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31
    # in the last channel, the last voxel looks for the one before it
    q[0, -1, -1, -1] = 100
    k[0, -1, -1, -2] = 100
    v = cover_kernels.veu(q, k, (1, 3), scale=1.0)
    assert v[0, :, -1, -1].tolist() == [0, -1]
    assert v[0, :, 4000, 2000].tolist() == [0, 0]


@needs_memory
def test_warp_of_an_image_beyond_31_bits():
    H, W = 32768, 65600
    x = torch.zeros(1, 1, H, W, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[0, 0, -1, -1] = 3
    x[0, 0, -2, -3] = 5
    flow = torch.zeros(1, 2, H // 64, W // 64)
    flow[0, :, -1, -1] = torch.tensor([-1 / 64, -2 / 64])  # a row up and two columns back, in voxels of x
    y = cover_kernels.warp(x, flow, 64)
    assert y[0, 0, -1, -1] == 5
    assert y[0, 0, -1, -40:-1].sum() == 0
