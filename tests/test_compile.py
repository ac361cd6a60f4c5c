"""torch.compile of the backbone and of the whole step: what is compiled trains, and no more than rounding changes."""

import shutil

import pytest
import torch
from tiny import SETTINGS, volumes

from cover import checkpoint, log, pretrain

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile wants a C++ compiler for the CPU"
)


@pytest.fixture(autouse=True)
def afresh():
    """Without what was compiled before; and nothing is left, for it would count against the limits of other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "settings",
    [
        dict(compile="backbone", recompute="norms"),
        dict(compile="step"),
        dict(compile="step", recompute="all", precision="bf16", accumulate=2),
    ],
)
def test_compiled_code_trains_alike(tmp_path, settings):
    data = volumes(tmp_path / "data")
    plain = pretrain(data, out=tmp_path / "plain", **SETTINGS | settings | dict(compile="off"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = pretrain(data, out=tmp_path / "compiled", **SETTINGS | settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    # fused code rounds to bfloat16 less often; Adam divides small gradients by their own size
    half = settings.get("precision") == "bf16"
    for a, b in zip(log.read(compiled, "train"), log.read(plain, "train"), strict=True):
        for name in ("loss", "epe", "mask_fraction"):
            assert a[name] == pytest.approx(b[name], rel=5e-2 if half else 1e-3), name
    weights = [checkpoint.load(checkpoint.find(run))["model"] for run in (compiled, plain)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-3 if half else 1e-4)  # six steps of 1e-3 at the most
