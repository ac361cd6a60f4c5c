"""Fused operators of vector contrastive learning: `veu`, `warp` and `compose`, in 2D and 3D."""

from cover_kernels.backends import backend_info, use_backend
from cover_kernels.compose import compose
from cover_kernels.version import __version__
from cover_kernels.veu import veu
from cover_kernels.warp import warp

__all__ = ["__version__", "backend_info", "compose", "use_backend", "veu", "warp"]
