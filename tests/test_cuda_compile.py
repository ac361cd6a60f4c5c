"""The CUDA kernels compile, and what the compiler makes of them is within benchmarks/budget.json.

Where nvcc is, the sizes that the acceptance bars name are compiled and compared; `python benchmarks/budget.py` compares
all of them. The budget itself is checked everywhere.
"""

import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "budget.py"
spec = importlib.util.spec_from_file_location("budget", PATH)
budget = importlib.util.module_from_spec(spec)
spec.loader.exec_module(budget)

RECORDED = json.loads(budget.BUDGET.read_text())
KERNELS = ("veu_fwd", "veu_bwd grad_q", "veu_bwd grad_k")
# float32, C = 8: at most 20 issued instructions for a pair, the 8 multiply-adds included; a quarter of the threads
BARS = ("veu_fwd f32 2D C=8 N=7 sm_90", "veu_fwd f32 3D C=8 N=5 sm_90")
SIZES = {"veu_fwd": "X(8,5) X(8,7)", "veu_bwd": "X(8,5) X(8,7)", "veu_fwd_mma": "X(32,7)"}

needs_nvcc = pytest.mark.skipif(not budget.find("nvcc"), reason="nvcc is not installed")
needs_nvdisasm = pytest.mark.skipif(not budget.find("nvdisasm"), reason="nvdisasm is not installed")


def assert_within_bars(kernels):
    for name in BARS:
        assert kernels[name]["instructions_per_pair"] <= 20 and kernels[name]["occupancy"] >= 0.25, name


def test_budget_covers_every_shipped_kernel_and_keeps_the_bars():
    kernels = RECORDED["kernels"]
    for kernel, dtype, d, C, N, arch in product(KERNELS, ("f32", "bf16"), (2, 3), (8, 16, 32), (3, 5, 7), (80, 90)):
        name = f"{kernel} {dtype} {d}D C={C} N={N} sm_{arch}"
        assert kernels[name]["spilled_bytes"] == 0, name
    for d, C, N, arch in product((2, 3), (16, 32), (3, 5, 7), (80, 90)):
        name = f"veu_fwd mma bf16 {d}D C={C} N={N} sm_{arch}"
        assert kernels[name]["spilled_bytes"] == 0, name
    assert_within_bars(kernels)


def test_budget_is_that_of_the_sources():
    assert RECORDED["sources"] == budget.sources(), "the CUDA sources changed: run python benchmarks/budget.py --update"


@pytest.mark.parametrize(
    ("name", "counts"),
    [("cuda/veu_fwd_mma.cu", True), ("cuda/sums.cuh", True), ("kernels.h", True), ("binding.h", False)],
)
def test_sources_of_the_budget_are_what_the_kernels_include(tmp_path, monkeypatch, name, counts):
    shutil.copytree(budget.CUDA.parent, tmp_path / "csrc")
    monkeypatch.setattr(budget, "CUDA", tmp_path / "csrc" / "cuda")
    before = budget.sources()
    with open(tmp_path / "csrc" / name, "a") as file:
        file.write("// one line more\n")
    assert (budget.sources() != before) == counts


@needs_nvcc
@pytest.mark.parametrize("arch", budget.ARCHITECTURES)
@pytest.mark.parametrize("name", budget.FILES)
def test_kernels_compile_without_warnings(name, arch):
    cubin, report = budget.compile_file(name, arch, SIZES.get(name))
    assert cubin.stat().st_size > 0
    assert "warning" not in report


@needs_nvcc
@needs_nvdisasm
def test_what_the_compiler_makes_is_within_the_budget():
    measured = budget.measure(sizes=SIZES)
    assert_within_bars(measured)
    for name in BARS:
        assert sum(measured[name]["mix"].values()) == pytest.approx(measured[name]["instructions_per_pair"], abs=0.1)
    if budget.compiler() != RECORDED["nvcc"]:
        pytest.skip(f"the budget was made by nvcc {RECORDED['nvcc']}, this is {budget.compiler()}")
    assert budget.regressions(RECORDED["kernels"], measured) == []


def test_regressions_are_found():
    name, figures = BARS[0], RECORDED["kernels"][BARS[0]]
    assert budget.regressions(RECORDED["kernels"], {name: figures}) == []
    for worse, message in [
        ({"spilled_bytes": 8}, "8 bytes spilled, 0 allowed"),
        ({"occupancy": figures["occupancy"] / 2}, "occupancy"),
        ({"instructions_per_pair": 1.03 * figures["instructions_per_pair"]}, "instructions for each pair"),
    ]:
        (found,) = budget.regressions(RECORDED["kernels"], {name: {**figures, **worse}})
        assert message in found
    assert budget.regressions({}, {name: figures}) == [f"{name}: not in the budget"]


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "threads", "blocks"),
    # made with NVIDIA's cuda_occupancy.h
    [
        (80, 32, 0, 128, 16),
        (90, 128, 20000, 128, 4),
        (90, 104, 47000, 128, 4),
        (86, 40, 33333, 192, 2),
        (80, 255, 0, 256, 1),
        (80, 33, 0, 128, 12),
        (90, 192, 0, 64, 4),
        (86, 16, 0, 32, 16),
    ],
)
def test_occupancy_is_that_of_nvidias_calculator(arch, registers, shared_bytes, threads, blocks):
    assert budget.occupancy(arch, registers, shared_bytes, threads) == blocks * threads / budget.LIMITS[arch][0]


SASS = """
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R2, R2 ;
        /*0020*/                   FFMA R7, R7, R2, R7 ;
.L_x_2:
        /*0030*/                   LDS.128 R4, [R3] ;
        /*0040*/                   FFMA R5, R4, R2, R5 ;
        /*0050*/              @!P0 FFMA.FTZ R6, R4, R2, R6 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_the_loop_with_the_products_is_counted(monkeypatch):
    monkeypatch.setattr(budget, "find", lambda tool: tool)
    monkeypatch.setattr(budget, "run", lambda *command: SASS)
    assert budget.inner_loops(Path("a.cubin")) == {"kernel": {"LDS": 1, "FFMA": 2, "BRA": 1}}
