"""Which implementation serves a call: compiled C++ or CUDA, Triton, or `reference`, which is plain torch.

Every backend implements the table of `schemas.py`. The public operators live in `torch.ops.cover_kernels`; each
compiled backend has a library of its own, `torch.ops.cover_kernels_<backend>`, with the same schemas. The others are
modules with a function for each operator.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path

import torch

from cover_kernels.checks import check_raw
from cover_kernels.schemas import SCHEMAS

_ENV = "COVER_KERNELS_BACKEND"
# operator -> the names of its arguments
_NAMES = {name: re.findall(r"(\w+)[,)]", schema.partition(" ->")[0]) for name, schema in SCHEMAS.items()}
_libraries = []


def _load(name: str, target_symbol: str, missing: str) -> tuple[str, str | None]:
    """Load a compiled library: (what it was compiled for, the reason why it cannot be used or None)."""
    library = torch.library.Library(f"cover_kernels_{name}", "DEF")
    for operator, schema in SCHEMAS.items():
        library.define(operator + schema)
    _libraries.append(library)
    built = sorted(Path(__file__).parent.glob(f"_{name}*.so"))
    if not built:
        return "", missing
    try:
        torch.ops.load_library(built[0])
        target = getattr(ctypes.CDLL(str(built[0])), target_symbol)
    except (OSError, RuntimeError, AttributeError) as error:
        return "", f"{built[0].name} does not load into torch {torch.__version__}: {error.__cause__ or error}"
    target.restype = ctypes.c_char_p
    return (target() or b"").decode(), None


def _load_cpu() -> tuple[str, str | None]:
    isa, problem = _load(
        "cpu",
        "cover_kernels_cpu_isa",
        "the compiled library cover_kernels/_cpu*.so is missing: this installation was not built",
    )
    if not problem and not isa:
        forced = os.environ["COVER_KERNELS_ISA"]
        problem = f"COVER_KERNELS_ISA={forced} is not avx512_bf16, avx512, avx2 or generic, or not in this processor"
    return isa, problem


def _load_cuda() -> tuple[str, str | None]:
    return _load(
        "cuda",
        "cover_kernels_cuda_architectures",
        "the compiled library cover_kernels/_cuda*.so is missing: where this installation was built, there was no CUDA "
        "build of torch, or no toolkit for its CUDA",
    )


# backend -> what it was compiled for, and the reason why it cannot serve (None: it can)
_COMPILED_FOR: dict[str, str] = {}
_UNAVAILABLE: dict[str, str | None] = {}
_COMPILED_FOR["cpu"], _UNAVAILABLE["cpu"] = _load_cpu()
_COMPILED_FOR["cuda"], _UNAVAILABLE["cuda"] = _load_cuda()
_UNAVAILABLE["triton"] = None if importlib.util.find_spec("triton") else "the package triton is not installed"
_UNAVAILABLE["reference"] = None
# torch's name of a device -> the backends that serve it, best first. AMD's GPUs are "cuda" too.
_DEVICES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_forced: str | None = None
_warned: set[str] = set()


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures, such as "sm_80 sm_90a compute_90", runs on a GPU.

    A binary runs on its own and later minor versions of its major one, PTX on all later GPUs; code for an
    architecture with its special features (a) on no other.
    """
    for kind, *version, special in re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", architectures):
        compiled = (int(version[0]), int(version[1]))
        if special == "a":
            runs = compiled == capability
        elif kind == "sm" or special == "f":
            runs = compiled[0] == capability[0] and compiled <= capability
        else:
            runs = compiled <= capability
        if runs:
            return True
    return False


def _problem(name: str, device: torch.device) -> str | None:
    """Why a backend that is there cannot serve a device; None if it can."""
    if name == "triton" and device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "does not serve cpu tensors, but under TRITON_INTERPRET=1"
    if name != "reference" and name not in _DEVICES.get(device.type, ()):
        return f"does not serve {device.type} tensors"
    if name == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if not runs_on(_COMPILED_FOR["cuda"], (major, minor)):
            return f"has no code for sm_{major}{minor}: it was compiled for {_COMPILED_FOR['cuda']}"
    return None


def _check_known(name: str, origin: str) -> None:
    if name not in _UNAVAILABLE:
        raise ValueError(f"{origin}: `backend` must be one of {', '.join(_UNAVAILABLE)}, got {name!r}")
    if _UNAVAILABLE[name] is not None:
        raise RuntimeError(f"{origin}: backend {name!r} cannot serve: {_UNAVAILABLE[name]}")


@contextlib.contextmanager
def use_backend(name: str | None):
    """Force one backend inside a `with` block, for every operator and device (None: choose by device).

    The environment variable COVER_KERNELS_BACKEND does the same for a whole process. Raises ValueError for an
    unknown name and RuntimeError, naming what is missing, for a backend that cannot serve here. The choice is
    process-wide and is made when an operator runs, also inside a compiled graph.
    """
    global _forced
    if name is not None:
        _check_known(name, "use_backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(device: torch.device | str) -> tuple[str, str]:
    """The backend that serves tensors on `device` now, and why: ("cpu", "first choice for cpu tensors, ...").

    Raises RuntimeError, naming what is missing, if a backend is forced that cannot serve the device.
    """
    device = torch.device(device)
    forced = _forced or os.environ.get(_ENV)
    if forced:
        origin = "use_backend" if _forced else _ENV
        _check_known(forced, origin)
        if problem := _problem(forced, device):
            raise RuntimeError(f"{origin}: backend {forced!r} {problem}")
        return forced, f"forced by {origin}"
    reasons = []
    for name in _DEVICES.get(device.type, ()):
        problem = _UNAVAILABLE[name] or _problem(name, device)
        if problem is None:
            compiled = f", compiled for {_COMPILED_FOR[name]}" if name in _COMPILED_FOR else ""
            return name, "; ".join(reasons) or f"first choice for {device.type} tensors{compiled}"
        reasons.append(f"not {name}: {problem}")
    return "reference", f"no compiled backend serves {device.type} tensors"


def serving(device: torch.device | str) -> list[str]:
    """Every backend that could serve tensors on `device`, the reference included."""
    device = torch.device(device)
    return [name for name in _UNAVAILABLE if _UNAVAILABLE[name] is None and _problem(name, device) is None]


def run(operator: str, *args):
    """Run one operator of `schemas.py` on the backend that serves its first tensor. What does not fit is refused."""
    device = args[0].device
    name, reason = choose(device)
    if name in _COMPILED_FOR:
        return getattr(getattr(torch.ops, f"cover_kernels_{name}"), operator)(*args)
    if name == "reference" and "forced" not in reason and device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"cover_kernels runs on its slow reference implementation: {reason}", stacklevel=2)
    check_raw(operator, dict(zip(_NAMES[operator], args, strict=True)))
    return getattr(importlib.import_module(f"cover_kernels.{name}"), operator)(*args)


def devices() -> list[str]:
    """The devices of this machine that torch can use: "cpu", "cuda:0", ..."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def backend_info() -> dict[str, dict[str, str]]:
    """Which backend serves each device of this machine, and why; and what each one was compiled for.

    {"cpu": {"backend": "cpu", "reason": ...}, "cuda:0": {...}, "compiled": {"cpu": "avx512", "cuda": "sm_80 sm_90"}};
    a backend that cannot be used says why instead.
    """
    info = {device: dict(zip(("backend", "reason"), choose(device), strict=True)) for device in devices()}
    compiled = {name: _UNAVAILABLE[name] or target for name, target in _COMPILED_FOR.items()}
    return {**info, "compiled": {**compiled, "triton": _UNAVAILABLE["triton"] or "compiled when first used"}}
