"""The operators of cover_kernels/schemas.py on the kernels that build.py compiled, for torch tensors.

    with Harness() as harness:                          # inside, every operator of cover_kernels runs on it
        y = cover_kernels.veu(q, k, 5)
    harness.calls                                       # what ran: (name, arguments as numpy arrays and numbers)

A recorded call can be replayed in a process of its own: `replay`.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_on_cpu.build import COMPILER, build, load

SCHEDULES = ("forward", "reverse", "random")
_DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# operator -> positions of the tensors whose dtypes binding.cpp is told
_TYPED = {
    "veu_fwd": (0,),
    "veu_bwd": (1,),
    "warp_fwd": (0, 1),
    "warp_bwd": (1, 2),
    "compose_fwd": (0,),
    "compose_bwd": (0,),
}


@cache
def _module():
    return load(build())


def _to_numpy(value):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().contiguous()
    return (value.view(torch.uint16) if value.itemsize == 2 else value).numpy()


class Harness(TorchDispatchMode):
    """Redirects the registered operators, forward and backward, to the kernels on the CPU, in one schedule."""

    def __init__(
        self,
        schedule: str = "forward",
        max_blocks: int = 2**31 - 1,
        max_shared: int = 227 * 1024,
        architecture: int = 90,
    ):
        super().__init__()
        self.module = _module()
        self.module.set_schedule(schedule, 0)
        self.module.set_device(max_blocks, max_shared, architecture)
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "cover_kernels":
            return func(*args, **(kwargs or {}))
        name = func.__name__.removesuffix(".default")
        if name.startswith("warp"):
            args = args[:-1]  # the kernels know one order of memory
        arguments = [*(_DTYPES[args[i].dtype] for i in _TYPED[name]), *map(_to_numpy, args)]
        self.calls.append((name, arguments))
        outputs = getattr(self.module, name)(*arguments)
        half = next((t.dtype for t in args if isinstance(t, torch.Tensor) and t.itemsize == 2), None)
        tensors = [torch.from_numpy(a) for a in (outputs if isinstance(outputs, tuple) else (outputs,))]
        tensors = [t.view(half) if t.dtype == torch.uint16 else t for t in tensors]
        return tuple(tensors) if isinstance(outputs, tuple) else tensors[0]


def _runtime_library(name: str) -> str:
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def replay(folder: Path, calls, variant: str = "plain", schedule: str = "forward") -> subprocess.CompletedProcess:
    """Run recorded calls on the module in `folder`, in a new process without torch, under the variant's sanitizer.

    Returns the process: `returncode` is not 0 if a sanitizer reported or the process crashed; `stderr` has the
    report; `outputs` is the list of each call's tuple of numpy arrays, None after a failure.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    if variant == "address":
        environment["LD_PRELOAD"] = f"{_runtime_library('libasan.so')} {_runtime_library('libubsan.so')}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    elif variant == "thread":
        environment["LD_PRELOAD"] = _runtime_library("libtsan.so")
        environment["TSAN_OPTIONS"] = "halt_on_error=1:report_signal_unsafe=0"
    with tempfile.TemporaryDirectory() as tmp:
        given, result = Path(tmp) / "calls", Path(tmp) / "outputs"
        given.write_bytes(pickle.dumps(calls))
        command = [sys.executable, "-m", "cuda_on_cpu.replay", str(folder), str(given), str(result), schedule]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        done.outputs = pickle.loads(result.read_bytes()) if done.returncode == 0 else None
    return done
