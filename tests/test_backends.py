"""The choice of a backend: by device, forced, refused, and what happens where nothing was compiled."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cover_kernels
from cover_kernels import __main__ as self_test
from cover_kernels import backends
from cover_kernels.schemas import SCHEMAS


def test_info_names_backend_and_reason():
    info = cover_kernels.backend_info()["cpu"]
    assert info["backend"] == "cpu" and "compiled for" in info["reason"]
    with cover_kernels.use_backend("reference"):
        assert cover_kernels.backend_info()["cpu"] == {"backend": "reference", "reason": "forced by use_backend"}


def test_forcing_an_unknown_backend_is_refused():
    message = "must be one of cpu, cuda, triton, reference, got 'tpu'"
    with pytest.raises(ValueError, match=message), cover_kernels.use_backend("tpu"):
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
    with warnings.catch_warnings(), cover_kernels.use_backend("reference"):
        warnings.simplefilter("error")  # who asks for it is not warned
        cover_kernels.veu(x, x, 3)
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


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80 sm_90", (8, 0), True),
        ("sm_80 sm_90", (8, 6), True),  # a later minor version
        ("sm_86", (8, 0), False),  # an earlier one
        ("sm_80", (9, 0), False),
        ("sm_80 compute_80", (12, 0), True),  # PTX is compiled for what comes later
        ("compute_90", (8, 6), False),
        ("sm_90a", (9, 0), True),
        ("compute_90a", (10, 0), False),
        ("sm_100 sm_120", (12, 1), True),
        ("sm_100f", (10, 3), True),
        ("compute_100f", (12, 0), False),  # its features are those of its major version
        ("", (8, 0), False),
    ],
)
def test_which_gpus_an_architecture_runs_on(architectures, capability, runs):
    assert backends.runs_on(architectures, capability) is runs


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an sm_86 GPU, a CUDA extension with code for it, and Triton: as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setitem(backends._UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(backends._UNAVAILABLE, "triton", None)
    monkeypatch.setitem(backends._COMPILED_FOR, "cuda", "sm_80 sm_90")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


def test_a_gpu_is_served_by_cuda_then_triton_then_the_reference(gpu):
    assert backends.choose("cuda:0") == ("cuda", "first choice for cuda tensors, compiled for sm_80 sm_90")
    assert cover_kernels.backend_info()["cuda:0"]["backend"] == "cuda"
    assert backends.serving("cuda:0") == ["cuda", "triton", "reference"]
    gpu.setitem(backends._COMPILED_FOR, "cuda", "sm_90")
    no_code = "not cuda: has no code for sm_86: it was compiled for sm_90"
    assert backends.choose("cuda:0") == ("triton", no_code)
    gpu.setitem(backends._UNAVAILABLE, "triton", "the package triton is not installed")
    assert backends.choose("cuda:0") == ("reference", f"{no_code}; not triton: the package triton is not installed")
    with cover_kernels.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' has no code for sm_86"):
        backends.choose("cuda:0")


def test_a_forced_backend_that_does_not_serve_the_device_is_refused(gpu):
    x = torch.zeros(1, 1, 2, 2)
    with cover_kernels.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' does not serve cpu tensors"):
        cover_kernels.veu(x, x, 3)
    with cover_kernels.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' does not serve cuda tensors"):
        backends.choose("cuda:0")
    with cover_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="cpu tensors, but under TRITON_INTERP"):
        cover_kernels.veu(x, x, 3)
    gpu.setenv("TRITON_INTERPRET", "1")
    with cover_kernels.use_backend("triton"):
        assert backends.choose("cpu") == ("triton", "forced by use_backend")
    assert backends.choose("cpu")[0] == "cpu"


def test_forcing_a_backend_that_was_not_built_says_what_is_missing(monkeypatch):
    _, reason = backends._load("nothing", "symbol", "there was no CUDA toolkit")
    monkeypatch.setitem(backends._UNAVAILABLE, "cuda", reason)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve: there was no CUDA toolkit"):
        cover_kernels.use_backend("cuda").__enter__()


def test_a_library_that_does_not_load_says_so(monkeypatch, tmp_path):
    (tmp_path / "_broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    compiled_for, reason = backends._load("broken", "symbol", "missing")
    assert compiled_for == "" and re.match(r"_broken\.so does not load into torch \d.*_broken\.so", reason, re.DOTALL)


def test_info_says_what_was_compiled(gpu):
    compiled = cover_kernels.backend_info()["compiled"]
    assert compiled["cuda"] == "sm_80 sm_90" and compiled["cpu"] == backends._COMPILED_FOR["cpu"] != ""
    gpu.setitem(backends._UNAVAILABLE, "cuda", "no toolkit")
    gpu.setitem(backends._UNAVAILABLE, "triton", "no triton")
    compiled = cover_kernels.backend_info()["compiled"]
    assert compiled["cuda"] == "no toolkit" and compiled["triton"] == "no triton"


@pytest.mark.skipif(
    not list(Path(backends.__file__).parent.glob("_cuda*.so")), reason="this installation was built without CUDA"
)
def test_the_cuda_extension_loads_without_a_gpu_and_has_every_operator():
    assert backends._UNAVAILABLE["cuda"] is None
    assert re.fullmatch(r"((sm|compute)_\d+[af]? ?)+", cover_kernels.backend_info()["compiled"]["cuda"])
    for operator in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cover_kernels_cuda::{operator}", "CUDA")


def test_self_test_passes_and_prints_the_table(capsys):
    assert self_test.main() == 0
    printed = capsys.readouterr().out
    in_use = {name for device in backends.devices() for name in backends.serving(device)}
    assert "cpu: cpu (first choice for cpu tensors" in printed and "backend cuda: " in printed
    assert ("; it serves no device here" in printed.split("backend triton: ")[1]) == ("triton" not in in_use)
    assert "self-test of cpu on cpu: veu passed, warp passed, compose passed" in printed


@pytest.mark.parametrize("operator", ["veu_fwd", "warp_bwd", "compose_fwd"])
def test_self_test_finds_a_wrong_operator(monkeypatch, capsys, operator):
    def wrong(name, *args):
        result = right(name, *args)
        if name == operator and backends.choose("cpu")[0] == "cpu":
            result = tuple(1.01 * t for t in result) if isinstance(result, tuple) else 1.01 * result
        return result

    right = backends.run
    library = torch.library.Library("cover_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it overrides the registered kernel
        library.impl(operator, lambda *args: wrong(operator, *args), "CPU")
    try:
        assert self_test.main() == 1
    finally:
        library._destroy()
    assert f"{operator.split('_')[0]} FAILED" in capsys.readouterr().out


def test_self_test_reports_a_backend_that_raises(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "serving", lambda device: ["cuda", "cpu"])
    monkeypatch.setitem(backends._UNAVAILABLE, "cuda", "it is not there")
    assert self_test.main() == 1
    printed = capsys.readouterr().out
    assert (
        "self-test of cuda on cpu: FAILED: RuntimeError" in printed and "self-test of cpu on cpu: veu pass" in printed
    )
