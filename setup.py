"""Builds the CPU kernels against LibTorch's stable ABI: one library for every Python and torch >= 2.10.

Environment: COVER_DEBUG=1 builds without optimisation and with debug information; COVER_SANITIZE=address,undefined
(any list that the compiler's -fsanitize takes) builds with sanitizers.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

debug = os.environ.get("COVER_DEBUG", "0") == "1"
sanitizers = os.environ.get("COVER_SANITIZE", "")

compile_args = [
    "-std=c++17",
    "-O0" if debug else "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-aggressive-loop-optimizations",
]
compile_args += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the oldest torch whose stable ABI is used: 2.10
link_args = []
if debug or sanitizers:
    compile_args += ["-g", "-fno-omit-frame-pointer"]
else:
    compile_args += ["-g0"]
if sanitizers:
    compile_args += [f"-fsanitize={sanitizers}", "-O1"]
    link_args += [f"-fsanitize={sanitizers}"]

sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))

setup(
    ext_modules=[
        CppExtension(
            "cover_kernels._cpu",
            sources,
            extra_compile_args={"cxx": compile_args},
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
