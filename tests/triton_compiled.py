"""Compiles the Triton kernels for GPUs that need not be there, and saves what they use of one.

    python triton_compiled.py RESULTS

A process of its own: Triton decides when it is imported whether kernels are compiled or interpreted. The operators are
called on meta tensors, behind a driver that names the GPU; each launch compiles exactly what the same call would on
that GPU, alignment of pointers and sizes included. RESULTS (see torch.save) is a dict: (target, case, kernel) ->
{"registers", "stack", "shared", "ftz": whether arithmetic takes denormal numbers for 0}; of AMD's code only that it
was made, None. Without RESULTS it is printed.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cover_kernels.triton import compose_bwd, compose_fwd, veu_bwd, veu_fwd, warp_bwd, warp_fwd

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """Stands for a GPU of each target: all that Triton asks before it compiles."""

    def __init__(self):
        self.device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return list(TARGETS.values())[self.device]


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def veu(C, N, S, dtype, heads=1, masked=False):
    q, k = meta(2, heads * C, *S, dtype=dtype), meta(2, heads * C, *S, dtype=dtype)
    mask = meta(2, 1, *S, dtype=torch.bool) if masked else None
    v, lse = veu_fwd(q, k, [N] * len(S), heads, 0.5, mask)
    veu_bwd(torch.empty_like(v), q, k, v, lse, [N] * len(S), heads, 0.5, mask)


def sampling(C, S, stride, dtype, deterministic, border=False):
    d = len(S)
    x, flow = meta(2, C, *S, dtype=dtype), meta(2, d, *(n // stride for n in S), dtype=dtype)
    warp_fwd(x, flow, [stride] * d, border, False)
    warp_bwd(torch.empty_like(x), x, flow, [stride] * d, border, deterministic, False)
    residual = meta(2, d, *S, dtype=dtype)
    compose_fwd(flow, residual, [stride] * d)
    compose_bwd(torch.empty_like(residual), flow, residual, [stride] * d, deterministic)


PLANE, VOLUME = (384, 384), (48, 48, 48)
EVERYWHERE = {
    "veu volume, C=4 N=3": lambda: veu(4, 3, VOLUME, torch.float32),
    "sampling plane, coarser flow": lambda: sampling(8, PLANE, 2, torch.float32, False),
}
ON_SM_90 = {
    "sampling volume, coarser flow": lambda: sampling(8, VOLUME, 2, torch.float32, False),
    "veu volume, C=8 N=5": lambda: veu(8, 5, VOLUME, torch.float32),
    "veu plane, C=8 N=7": lambda: veu(8, 7, PLANE, torch.float32),
    "veu plane, C=16 N=5, bfloat16": lambda: veu(16, 5, PLANE, torch.bfloat16),
    "veu plane, C=32 N=3, bfloat16, groups and mask": lambda: veu(32, 3, PLANE, torch.bfloat16, 2, masked=True),
    "veu plane, C=64 N=3, groups": lambda: veu(64, 3, PLANE, torch.float32, 2),
    "veu volume, C=40 N=5, bfloat16, groups and mask": lambda: veu(40, 5, VOLUME, torch.bfloat16, 2, masked=True),
    "veu plane, C=3 N=3, float64": lambda: veu(3, 3, PLANE, torch.float64),
    "sampling plane, float16, deterministic": lambda: sampling(8, PLANE, 1, torch.float16, True, border=True),
    "sampling volume, float64, deterministic": lambda: sampling(8, VOLUME, 1, torch.float64, True),
}


def usage(kernel):
    """Registers of a thread, bytes of its stack (what spills lies there) and shared memory of a program."""
    if "cubin" not in kernel.asm:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        printed = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", printed)[1]) for what in ("REG", "STACK", "LOCAL"))
    # of a position's floor it does no harm
    ftz = ".ftz" in kernel.asm["ptx"].replace("cvt.rmi.ftz", "")
    return {"registers": registers, "stack": stack + local, "shared": kernel.metadata.shared, "ftz": ftz}


def compile_all():
    """{(target, case, kernel): usage}"""
    driver, found = Driver(), {}
    jit_run, made = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        made[self.__name__] = usage(jit_run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(driver)
    with mock.patch.object(JITFunction, "run", compile_only):
        for driver.device, target in enumerate(TARGETS):
            for case, call in (EVERYWHERE | (ON_SM_90 if target == "sm_90" else {})).items():
                made.clear()
                call()
                found.update({(target, case, kernel): used for kernel, used in made.items()})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = compile_all()
    if len(sys.argv) > 1:
        torch.save(found, sys.argv[1])
    else:
        print("\n".join(f"{' | '.join(key)} | {value}" for key, value in found.items()))
