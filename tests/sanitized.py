"""Runs the operators' fuzz on CPU kernels that were built with sanitizers, on every instruction set (`make sanitize`).

Python itself knows nothing of them: the sanitizers' libraries are loaded before it. First they must find a fault that
is there: a call on a tensor that claims more memory than it has.
"""

import os
import subprocess
import sys
from pathlib import Path

FAULT = """
import numpy as np, torch, cover_kernels
short = np.zeros(1000, np.float32)
x = torch.from_numpy(np.lib.stride_tricks.as_strided(short, (1, 1, 10, 500), (20000, 20000, 2000, 4)))
cover_kernels.warp(x, torch.zeros(1, 2, 10, 500))
"""


def environment(isa: str) -> dict[str, str]:
    """What makes a Python run on instrumented kernels of this instruction set."""
    cxx = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last: or exceptions would be thrown past the first
    libraries = [subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip() for name in names]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "COVER_KERNELS_ISA": isa,
    }


def main(options: list[str]) -> None:
    folder = Path(__file__).parent
    for isa in ("avx512_bf16", "avx512", "avx2", "generic"):
        print(f"\n{isa}", flush=True)
        done = subprocess.run([sys.executable, "-c", FAULT], env=environment(isa), capture_output=True, text=True)
        if "not in this processor" in done.stderr:
            print("not in this processor")
            continue
        if "AddressSanitizer: heap-buffer-overflow" not in done.stderr:
            raise SystemExit(f"a fault that is there was not found; were the kernels built so?\n{done.stderr}")
        command = [sys.executable, "-m", "pytest", "-q", "test_fuzz.py", *options]
        if subprocess.run(command, env=environment(isa), cwd=folder).returncode:
            raise SystemExit(f"{isa}: failed")


if __name__ == "__main__":
    main(sys.argv[1:])
