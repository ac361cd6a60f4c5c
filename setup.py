"""Builds the kernels against LibTorch's stable ABI: one library per backend for every Python and torch >= 2.10.

The CPU kernels are always built; the CUDA kernels where torch is a CUDA build and a toolkit of the same major version
(CUDA_HOME, or nvcc on the PATH) is there: no GPU is needed. Environment:
  FORCE_CUDA=1            what the CUDA kernels lack is an error; FORCE_CPU=1 leaves them out.
  TORCH_CUDA_ARCH_LIST    architectures, such as "8.0;9.0+PTX"; the default is every common one from 8.0 on.
  COVER_DEBUG=1           no optimisation, debug information.
  COVER_SANITIZE=address  any list that the compiler's -fsanitize takes, for the CPU kernels.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

debug = os.environ.get("COVER_DEBUG", "0") == "1"
sanitizers = os.environ.get("COVER_SANITIZE", "")


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder; a bare nvcc script on the PATH, without the headers beside it, is none."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for root in (*named, nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        if root and Path(root, "bin", "nvcc").exists() and Path(root, "include", "cuda_runtime.h").exists():
            return Path(root)
    return None


def ask_nvcc(toolkit: Path, question: str, answer: str) -> list[str]:
    """All that matches `answer` in what nvcc prints."""
    return re.findall(answer, subprocess.check_output([toolkit / "bin" / "nvcc", question], text=True))


def missing_for_cuda(toolkit: Path | None) -> list[str]:
    """What a build with CUDA lacks."""
    missing = [] if toolkit else ["a CUDA toolkit (set CUDA_HOME, or put nvcc on the PATH)"]
    if not (wanted := torch.version.cuda):
        missing.append(f"a CUDA build of torch (this is {torch.__version__})")
    elif toolkit and wanted.split(".")[0] not in ask_nvcc(toolkit, "--version", r"release (\d+)"):
        missing.append(f"a toolkit for torch's CUDA {wanted} ({toolkit} is of another major version)")
    return missing


def default_architectures(toolkit: Path) -> str:
    known = ask_nvcc(toolkit, "--list-gpu-arch", r"compute_(\d+)\b")
    return ";".join(f"{a // 10}.{a % 10}" for a in ARCHITECTURES if str(a) in known) + "+PTX"


toolkit = find_toolkit()
missing = missing_for_cuda(toolkit)
if os.environ.get("FORCE_CUDA") == "1" and missing:
    raise SystemExit(f"FORCE_CUDA=1, but the CUDA kernels need {' and '.join(missing)}")
with_cuda = not missing and os.environ.get("FORCE_CPU") != "1"
if with_cuda:
    os.environ["CUDA_HOME"] = str(toolkit)  # read when cpp_extension is imported
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(toolkit)

from torch.utils import cpp_extension  # noqa: E402

# 0x020a...: the oldest torch whose stable ABI is used, 2.10
common = ["-std=c++17", "-O0" if debug else "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
cxx = [*common, "-fvisibility=hidden", "-Wall", "-Wno-aggressive-loop-optimizations"]
cxx += ["-g", "-fno-omit-frame-pointer"] if debug or sanitizers else ["-g0"]
sanitize = [f"-fsanitize={sanitizers}", *([] if debug else ["-O1"])] if sanitizers else []
extensions = [
    cpp_extension.CppExtension(
        "cover_kernels._cpu",
        sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
        extra_compile_args={"cxx": cxx + sanitize},
        extra_link_args=sanitize[:1],
        py_limited_api=True,
    )
]
if with_cuda:
    targets = cpp_extension._get_cuda_arch_flags()
    names = " ".join(flag.rpartition("=")[2] for flag in targets)  # -gencode=arch=compute_90,code=sm_90
    # torch's own flags take away the conversions of the half types
    halves = ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    nvcc = [*common, *targets, *halves, "-Xcompiler=-fvisibility=hidden", *(["-G"] if debug else [])]
    extensions.append(
        cpp_extension.CUDAExtension(
            "cover_kernels._cuda",
            sorted(str(p) for p in Path("csrc/cuda").iterdir() if p.suffix in (".cu", ".cpp")),
            extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA", f'-DCOVER_ARCHITECTURES="{names}"'], "nvcc": nvcc},
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
