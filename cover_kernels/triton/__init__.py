"""The operators in Triton, for GPUs that no compiled CUDA code serves, AMD's among them; imported when first used.

The functions have the names, arguments and results of `cover_kernels.reference`, and what a forward saves is the
same: any backend's backward pairs with any forward. Tensors are on a "cuda" device (torch's name for AMD's GPUs too)
or, under TRITON_INTERPRET=1, on the CPU. No call waits for the device. The first call with a new dtype, number of
dimensions or channels, or innermost window compiles kernels: make it before a CUDA graph is captured.
"""

from cover_kernels.triton.compose import compose_bwd, compose_fwd
from cover_kernels.triton.veu import veu_bwd, veu_fwd
from cover_kernels.triton.warp import warp_bwd, warp_fwd

__all__ = ["compose_bwd", "compose_fwd", "veu_bwd", "veu_fwd", "warp_bwd", "warp_fwd"]
