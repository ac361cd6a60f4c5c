"""The choice of a backend: by device, forced, refused, and what happens where nothing was compiled."""

import subprocess
import sys
import warnings

import pytest
import torch

import cover_kernels
from cover_kernels import backends


def test_info_names_backend_and_reason():
    info = cover_kernels.backend_info()["cpu"]
    assert info["backend"] == "cpu" and "compiled for" in info["reason"]
    with cover_kernels.use_backend("reference"):
        assert cover_kernels.backend_info()["cpu"] == {"backend": "reference", "reason": "forced by use_backend"}


def test_forcing_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="must be one of cpu, reference, got 'tpu'"), cover_kernels.use_backend("tpu"):
        pass


def test_environment_variable_forces_and_is_checked(monkeypatch):
    monkeypatch.setenv("COVER_KERNELS_BACKEND", "reference")
    assert cover_kernels.backend_info()["cpu"]["reason"] == "forced by COVER_KERNELS_BACKEND"
    monkeypatch.setenv("COVER_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="COVER_KERNELS_BACKEND"):
        cover_kernels.veu(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 3)


def test_without_a_compiled_library_the_reference_serves_and_says_so_once(monkeypatch):
    monkeypatch.setitem(backends._UNAVAILABLE, "cpu", "the compiled library is missing")
    monkeypatch.setattr(backends, "_warned", set())
    x = torch.zeros(1, 1, 2, 2)
    with pytest.warns(UserWarning, match="slow reference implementation: not cpu: the compiled library is missing"):
        cover_kernels.veu(x, x, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cover_kernels.veu(x, x, 3)
    with (
        pytest.raises(RuntimeError, match="'cpu' cannot serve: the compiled library"),
        cover_kernels.use_backend("cpu"),
    ):
        pass


def test_an_unknown_instruction_set_leaves_the_reference_with_the_reason():
    script = "import cover_kernels; print(cover_kernels.backend_info()['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"COVER_KERNELS_ISA": "mmx"}, capture_output=True, text=True
    )
    assert "'backend': 'reference'" in done.stdout and "COVER_KERNELS_ISA=mmx" in done.stdout, done.stderr
