"""Compiles csrc/cuda for the CPU: build("plain" | "address" | "thread") gives the folder of a Python extension module.

Needs g++ and pybind11 alone. Objects are cached in the temporary folder under a hash of all that goes into them, so
that a change of one source compiles one object, and a mutant (test_cuda_mutants.py) too.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from cuda_on_cpu.rewrite import rewrite

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")

# sanitizers -> flags of the kernels, and definitions of the runtime, which is never instrumented itself
VARIANTS = {
    "plain": ([], []),
    # not optimised: compiles in half the time, and nothing undefined is optimised away
    "address": (["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-DCOVER_ASAN"]),
    "thread": (["-fsanitize=thread"], ["-DCOVER_TSAN"]),
}
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# The (C, N) that veu gets kernels of its own for here: all ways of being cut. A GPU gets more.
SIZES = ("-DCOVER_VEU_SIZES(X)=X(8,7)X(8,5)X(16,3)X(32,3)", "-DCOVER_VEU_MMA_SIZES(X)=X(16,7)X(32,3)X(32,5)X(32,7)")


def missing() -> str:
    """Why this machine cannot run the harness; empty where it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the harness switches between fibers on x86-64 only, this is {platform.machine()}"
    return "" if shutil.which(COMPILER) else f"the harness needs the compiler {COMPILER}"


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cover_cuda_on_cpu_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _rewritten(csrc: dict[str, str]) -> dict[str, str]:
    """Path under the build folder -> text, for `csrc` given as path under csrc -> text."""
    return {f"csrc/{path}": f'#line 1 "csrc/{path}"\n' + rewrite(text) for path, text in csrc.items()}


def sources() -> dict[str, str]:
    """What is compiled of csrc: path -> text. binding.cpp is torch's."""
    paths = [CSRC / "kernels.h", *sorted((CSRC / "cuda").iterdir())]
    return {str(p.relative_to(CSRC)): p.read_text() for p in paths if p.name != "binding.cpp" and p.is_file()}


def of_types(csrc: dict[str, str], *types: str) -> dict[str, str]:
    """`csrc` with kernels for some storage types alone, such as "f32": all else would compile for all of them."""
    case = re.compile(r"case Dtype::(\w+): return f\(.*\);")
    kept = case.sub(lambda m: m[0] if m[1] in types else "", csrc["cuda/types.cuh"])
    return csrc | {"cuda/types.cuh": kept.replace("switch (dtype) {", "switch (dtype) { default: break;")}


def _with_headers(path: str, files: dict[str, str], seen: set[str]) -> set[str]:
    """`path` and all that it includes of the project's and of the harness's."""
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'#include ["<]([^">]+)[">]', files[path]):
            places = (os.path.normpath(os.path.join(os.path.dirname(path), name)), name, f"include/{name}")
            for found in {place for place in places if place in files}:
                _with_headers(found, files, seen)
    return seen


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compile(path: str, flags: list[str], files: dict[str, str]) -> Path:
    """The object of one source of `files` (path -> text)."""
    parts = [*flags, *(files[p] for p in sorted(_with_headers(path, files, set())))]
    folder = _cache() / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = folder / "object.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as tree:
            for name, text in files.items():
                (Path(tree) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(tree) / name).write_text(text)
            folder.mkdir(exist_ok=True)
            unfinished = folder / f"{os.getpid()}.o"
            includes = [f"-I{tree}", f"-I{tree}/include", f"-I{pybind11.get_include()}"]
            includes.append(f"-I{sysconfig.get_paths()['include']}")
            _run([COMPILER, *flags, *includes, "-x", "c++", "-c", f"{tree}/{path}", "-o", str(unfinished)])
            unfinished.rename(target)
    return target


def build(variant: str = "plain", csrc: dict[str, str] | None = None, sizes: tuple[str, ...] = SIZES) -> Path:
    """Compile and link one variant, of the sources `csrc` (default: sources()); returns the folder of the module."""
    csrc = csrc or sources()
    instrument, defines = VARIANTS[variant]
    own = [p for p in HERE.rglob("*") if p.suffix in (".h", ".cuh", ".cpp")]
    files = _rewritten(csrc) | {str(p.relative_to(HERE)): p.read_text() for p in own}
    jobs = [(p, [*FLAGS, *instrument, *sizes], files) for p in files if p.endswith(".cu")]
    jobs += [("runtime.cpp", [*FLAGS, *defines], files), ("binding.cpp", FLAGS, files)]
    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    key = hashlib.sha256("\0".join([variant, *map(str, objects)]).encode()).hexdigest()[:24]
    folder = _cache() / f"{variant}_{key}"
    module = folder / f"kernels_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        folder.mkdir(exist_ok=True)
        unfinished = folder / f"{os.getpid()}.so"
        _run([COMPILER, "-shared", *instrument, *map(str, objects), "-o", str(unfinished)])
        unfinished.rename(module)
    return folder


def load(folder: Path):
    """The extension module in a folder that build() returned."""
    (path,) = folder.glob("kernels_on_cpu*.so")
    spec = importlib.util.spec_from_file_location("kernels_on_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
