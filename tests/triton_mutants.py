"""Runs seeded faults of the Triton kernels (test_triton_mutants.py) in the interpreter, and saves what gave each away.

    TRITON_INTERPRET=1 python triton_mutants.py RESULTS

RESULTS (see torch.save) is a dict: why of a mutant -> the checker's or the interpreter's error, or the name of a result
that is off, "" if nothing is; and the same for each problem with the sources as they are.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import torch
import triton
from test_triton_mutants import MUTANTS
from triton_checker import Violation, checked

import cover_kernels
from cover_kernels import reference

SOURCES = {path.stem: path.read_text() for path in (Path(cover_kernels.__file__).parent / "triton").glob("*.py")}


def package(name, folder, file=None, old="", new=""):
    """cover_kernels.triton under another name, one text of one file replaced."""
    (folder / name).mkdir()
    for stem, text in SOURCES.items():
        if stem == file:
            assert old in text, old
            text = text.replace(old, new)
        (folder / name / f"{stem}.py").write_text(text.replace("cover_kernels.triton", name))
    kernels = importlib.import_module(name)
    # so that the second axis of the grid, and programs beyond the last, are met as well
    importlib.import_module(f"{name}.common").GRID_WIDTH = 2
    return kernels


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def veu(B, J, C, S, window, masked=False):
    """Arguments of veu_fwd, and the gradient of its first result."""
    mask = torch.rand((B, 1, *S), generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    # q and k must differ
    q, k = normal(2, B, J * C, *S)
    return (q, k, list(window), J, 0.8, mask), normal(B, len(S), *S)


def sampling(channels, S, stride, *rest):
    """Arguments of warp_fwd or compose_fwd, three images of them, and the gradient of the result."""
    coarse = [size // s for size, s in zip(S, stride, strict=True)]
    x, flow = normal(3, channels, *S), 2 * normal(3, len(S), *coarse)
    pair = (x, flow) if rest else (flow, x)
    return (*pair, list(stride), *rest), normal(3, channels, *S)


def loud(arguments, grad):
    """The same with channels of other magnitudes, and one gradient that is infinite."""
    grad = grad * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    grad[1, 1, 1, 1] = torch.inf
    return arguments, grad


# name -> (operator, arguments of the forward and gradient of its first result, deterministic)
PROBLEMS = {
    "groups and mask": ("veu", veu(2, 2, 2, (2, 3), (3, 3), masked=True), ()),
    "volume": ("veu", veu(1, 1, 1, (2, 3, 4), (3, 1, 3)), ()),
    "window of several turns": ("veu", veu(1, 1, 1, (1, 8), (1, 11)), ()),
    "several chunks": ("veu", veu(1, 1, 35, (1, 3), (1, 3)), ()),
    "warp": ("warp", sampling(2, (3, 4), (1, 1), False), (False,)),
    "warp, coarser flow": ("warp", sampling(1, (4, 4), (2, 2), True), (False,)),
    "warp, deterministic": ("warp", loud(*sampling(2, (3, 4), (1, 1), False)), (True,)),
    "compose": ("compose", sampling(2, (2, 4), (1, 2)), (False,)),
}


def results(kernels, operator, forward, grad, deterministic, dtype):
    """Name -> result of the operator's forward and backward."""
    forward = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in forward]
    order = (False,) if operator == "warp" else ()  # channels_last
    y = getattr(kernels, f"{operator}_fwd")(*forward, *order)
    saved = (*forward[:2], *(y if operator == "veu" else ()))
    grads = getattr(kernels, f"{operator}_bwd")(grad.to(dtype), *saved, *forward[2:], *deterministic, *order)
    names = ["grad of the first argument", "grad of the second argument"]
    return {"output": y[0] if operator == "veu" else y, **dict(zip(names, grads, strict=True))}


def report(kernels, problem):
    """What is wrong with the kernels, "" if nothing is."""
    operator, (forward, grad), deterministic = PROBLEMS[problem]
    expected = results(reference, operator, forward, grad, deterministic, torch.float64)
    try:
        with checked():
            found = results(kernels, operator, forward, grad, deterministic, torch.float32)
    except (Violation, triton.runtime.errors.InterpreterError) as error:
        return str(error)
    for name, actual in found.items():
        # an infinite gradient: see common.scatter
        exact = torch.where(expected[name].isfinite(), expected[name], torch.nan)
        if not torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True):
            return name
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        sys.path.insert(0, tmp)
        original = package("original", Path(tmp))
        found = {problem: report(original, problem) for problem in PROBLEMS}
        for i, mutant in enumerate(MUTANTS):
            kernels = package(f"mutant_{i}", Path(tmp), mutant.file, mutant.old, mutant.new)
            found[mutant.why] = report(kernels, mutant.problem)
    torch.save(found, sys.argv[1])
