"""setup.py: CUDA is built where torch and toolkit fit together, and a build without it never fails for want of it."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
--list-gpu-arch) printf "compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n" ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """What find_toolkit takes for CUDA 12.8."""
    for name, content in (("bin/nvcc", NVCC), ("include/cuda_runtime.h", "")):
        path = tmp_path / "cuda" / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


def run_setup(monkeypatch) -> tuple[list[str], dict]:
    """(names of the extensions, globals) of setup.py, which builds nothing."""
    built = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda ext_modules, **_: built.extend(e.name for e in ext_modules))
    module = runpy.run_path("setup.py")
    return built, module


@pytest.mark.parametrize(
    ("version", "missing"), [(None, "a CUDA build of torch"), ("13.0", "a toolkit for torch's CUDA 13.0")]
)
def test_what_does_not_fit_leaves_cuda_out_unless_it_is_forced(toolkit, monkeypatch, version, missing):
    monkeypatch.setattr(torch.version, "cuda", version)
    built, _ = run_setup(monkeypatch)
    assert built == ["cover_kernels._cpu"]
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=missing):
        run_setup(monkeypatch)


def test_the_architectures_are_those_that_nvcc_knows_from_sm_80_on(toolkit, monkeypatch):
    monkeypatch.setenv("FORCE_CPU", "1")
    monkeypatch.setattr(torch.version, "cuda", "12.9")  # another minor version fits
    _, module = run_setup(monkeypatch)
    assert module["missing"] == []
    assert module["default_architectures"](toolkit) == "8.0;9.0;10.0+PTX"
