"""Which implementation serves a call: `cpu` (compiled C++) where it was built, else `reference` (plain torch).

Every backend implements the table of `schemas.py`. The public operators live in `torch.ops.cover_kernels`; each
compiled backend has a library of its own, `torch.ops.cover_kernels_<backend>`, with the same schemas.
"""

import contextlib
import ctypes
import os
import warnings
from pathlib import Path

import torch

from cover_kernels import reference
from cover_kernels.schemas import SCHEMAS

_ENV = "COVER_KERNELS_BACKEND"
_libraries = []
_isa = ""


def _load_cpu() -> str | None:
    """Load the compiled CPU library; returns the reason why it cannot be used, None when it can."""
    global _isa
    library = torch.library.Library("cover_kernels_cpu", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    _libraries.append(library)
    built = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not built:
        return "the compiled library cover_kernels/_cpu*.so is missing: this installation was not built"
    try:
        torch.ops.load_library(built[0])
        isa = ctypes.CDLL(str(built[0])).cover_kernels_cpu_isa
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{built[0].name} does not load into torch {torch.__version__}: {error}"
    isa.restype = ctypes.c_char_p
    name = isa()
    if name is None:
        forced = os.environ["COVER_KERNELS_ISA"]
        return f"COVER_KERNELS_ISA={forced} is not avx512, avx2 or generic, or not in this processor"
    _isa = name.decode()
    return None


# backend -> the reason why it cannot serve (None: it can); the devices that it serves, best backend first
_UNAVAILABLE = {"cpu": _load_cpu(), "reference": None}
_DEVICES = {"cpu": ("cpu", "reference")}
_forced: str | None = None
_warned: set[str] = set()


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


def choose(device_type: str) -> tuple[str, str]:
    """The backend that serves tensors on `device_type` now, and why: ("cpu", "first choice for cpu tensors")."""
    forced = _forced or os.environ.get(_ENV)
    if forced:
        origin = "use_backend" if _forced else _ENV
        _check_known(forced, origin)
        if forced != "reference" and forced not in _DEVICES.get(device_type, ()):
            raise RuntimeError(f"{origin}: backend {forced!r} does not serve {device_type} tensors")
        return forced, f"forced by {origin}"
    reasons = []
    for name in _DEVICES.get(device_type, ()):
        if _UNAVAILABLE[name] is None:
            return name, "; ".join(reasons) or f"first choice for {device_type} tensors, compiled for {_isa}"
        reasons.append(f"not {name}: {_UNAVAILABLE[name]}")
    return "reference", f"no compiled backend serves {device_type} tensors"


def run(operator: str, *args):
    """Run one operator of `schemas.py` on the backend that serves its first tensor."""
    device_type = args[0].device.type
    name, reason = choose(device_type)
    if name == "reference":
        if "forced" not in reason and device_type not in _warned:
            _warned.add(device_type)
            warnings.warn(f"cover_kernels runs on its slow reference implementation: {reason}", stacklevel=2)
        return getattr(reference, operator)(*args)
    return getattr(getattr(torch.ops, f"cover_kernels_{name}"), operator)(*args)


def backend_info() -> dict[str, dict[str, str]]:
    """For each device of this machine: the backend that serves it, and why. {"cpu": {"backend", "reason"}}."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {device: dict(zip(("backend", "reason"), choose(device), strict=True)) for device in devices}
