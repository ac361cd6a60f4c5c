"""What the Triton kernels share: the launch grid, number formats, and where a program finds its voxels.

Shape legend (schemas.py): B batch, J groups, C channels of one group, d spatial dimensions, S = (D, H, W) spatial
shape, P = D * H * W voxels. A 2D problem is a 3D one with D = 1. `acc` is the accumulation type: float64 for float64,
float32 for all others, and everything is converted to it right after it was loaded.
"""

import torch
import triton
import triton.language as tl



# Programs along the first axis of a grid. 2^23 programs of 256 threads also respect AMD's limit of 2^32 threads; the
# second axis takes what is beyond, up to 2^38 programs.
GRID_WIDTH = 2**23
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def grid(programs):
    """The launch grid of that many programs; a few too many where one axis cannot hold them (see `program`)."""
    rows = triton.cdiv(programs, GRID_WIDTH)
    return triton.cdiv(programs, rows), rows


@triton.jit
def program():
    """Linear index of this program, int64. A kernel returns at once where it is not below the number of programs."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)




def volume(x):
    """(D, H, W) of x [B, C, *S], D = 1 in 2D."""
    return (1,) * (5 - x.dim()) + tuple(x.shape[2:])


def lanes():
    """Threads of a warp of the current device: 32, on most AMD GPUs 64."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def on_device(x):
    """Context in which the device of x is current; nothing to do for CPU tensors, which the interpreter takes."""
    return torch.cuda.device_of(x)
