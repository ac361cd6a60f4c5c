"""One command for the day a GPU is there: tests, compute-sanitizer and the operators beside their peers.

    python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu --quick      the same from end to end, in small, without a GPU

First the operators' tests run on the device, then compute-sanitizer's tools on the self-test where it is installed; if
something fails, nothing is timed. The times are those of bench_operators.py, at sizes that fill a GPU (tables.py).
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from cover_kernels.backends import devices

HERE = Path(__file__).parent
TEST_FILES = ("test_operators.py", "test_veu.py", "test_warp.py", "test_compose.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def pytest(folder: Path, *arguments: str, **environment: str) -> bool:
    """Whether pytest in that folder passed."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}).returncode == 0


def run_tests(device: str, quick: bool) -> bool:
    chosen = ["-k", "agrees_with_reference and float32"] if quick else []
    return pytest(HERE.parent / "tests", *TEST_FILES, *chosen, COVER_TEST_DEVICE=device)


def run_sanitizers(device: str) -> bool:
    """compute-sanitizer on the self-test; True where nothing was found, or where it cannot be run."""
    tool = shutil.which("compute-sanitizer")
    if device == "cpu" or not tool:
        print(f"compute-sanitizer: not run, {'the device is the CPU' if device == 'cpu' else 'it is not on the PATH'}")
        return True
    passed = True
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, "-m", "cover_kernels"]
        clean = subprocess.run(command).returncode == 0
        print(f"compute-sanitizer {name}: {'nothing found' if clean else 'FAILED'}")
        passed &= clean
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help='"cuda" or "cpu"')
    parser.add_argument("--quick", action="store_true", help="few tests, small problems: does all of it run?")
    parser.add_argument("--only-time", action="store_true", help="no tests and no sanitizers")
    parser.add_argument("--json", metavar="FILE", help="also write the results, for results.py and compare.py")
    arguments = parser.parse_args()
    device = arguments.device
    if device not in ("cpu", "cuda") or (device == "cuda" and "cuda:0" not in devices()):
        parser.error(f"torch {torch.__version__} has no device {device!r} here")
    if not arguments.only_time and not (run_tests(device, arguments.quick) and run_sanitizers(device)):
        print("something failed: nothing is timed")
        return 1
    options = ["--device", device, "--form", "quick" if arguments.quick else "full", "--benchmark-quiet"]
    options += ["-rfE", "--disable-warnings"]  # the table at the end says what was skipped and why
    if arguments.json:
        options += ["--benchmark-json", str(Path(arguments.json).resolve())]
    return 0 if pytest(HERE, "bench_operators.py", *options) else 1


if __name__ == "__main__":
    sys.exit(main())
