"""One command for the day a GPU is there: self-test, tests, compute-sanitizer and the operators beside their peers.

    python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu --quick      the same from end to end, in small, without a GPU

Every part is a process of its own, so that one which fails, crashes or hangs takes no other along: after an error in a
kernel, CUDA serves nothing else in its process. The table at the end says what passed. The times are those of
bench_operators.py, at sizes that fill a GPU (tables.py); each row is compared with the reference before it is timed.
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
OPERATORS = ("veu", "warp", "compose")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
HOURS = 2  # after which a part hangs
SELF_TEST = [sys.executable, "-m", "cover_kernels"]


def passes(command: list, folder: Path, **environment: str) -> bool:
    """Whether a command, run in that folder, ends well and in time."""
    try:
        done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, timeout=3600 * HOURS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def checks(device: str, quick: bool) -> dict[str, tuple]:
    """Name -> arguments of `passes`: self-test, tests, sanitizers."""
    tests, pytest = HERE.parent / "tests", [sys.executable, "-m", "pytest", "-q"]
    chosen = ["-k", "agrees_with_reference and float32"] if quick else []
    files = TEST_FILES[:1] if quick else TEST_FILES
    parts = {"self-test": (SELF_TEST, tests)}
    parts |= {f"tests, {file}": ([*pytest, file, *chosen], tests) for file in files}
    if device != "cpu" and (tool := shutil.which("compute-sanitizer")):
        command = [tool, "--error-exitcode", "1", "--tool"]
        parts |= {f"compute-sanitizer {name}": ([*command, name, *SELF_TEST], tests) for name in SANITIZERS}
    return parts


def benchmarks(device: str, quick: bool, folder: str | None) -> dict[str, tuple]:
    """Name -> arguments of `passes`, for each operator."""
    command = [sys.executable, "-m", "pytest", "-q", "bench_operators.py", "--device", device]
    # the table at the end says what was skipped and why
    command += ["--form", "quick" if quick else "full", "--benchmark-quiet", "-rfE", "--disable-warnings"]
    parts = {}
    for name in OPERATORS:
        saved = [f"--benchmark-json={Path(folder).resolve() / name}.json"] if folder else []
        parts[f"times, {name}"] = ([*command, "-k", name, *saved], HERE)
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help='"cuda" or "cpu"')
    parser.add_argument("--quick", action="store_true", help="few tests, small problems: does all of it run?")
    parser.add_argument("--only-time", action="store_true", help="no tests and no sanitizers")
    parser.add_argument("--json", metavar="FOLDER", help="also write veu.json, ..., for results.py and compare.py")
    arguments = parser.parse_args()
    device = arguments.device
    if device not in ("cpu", "cuda") or (device == "cuda" and "cuda:0" not in devices()):
        parser.error(f"torch {torch.__version__} has no device {device!r} here")
    if arguments.json:
        Path(arguments.json).mkdir(parents=True, exist_ok=True)
    parts = {} if arguments.only_time else checks(device, arguments.quick)
    parts |= benchmarks(device, arguments.quick, arguments.json)
    verdicts = {}
    for name, (command, folder) in parts.items():
        print(f"\n== {name}", flush=True)
        verdicts[name] = passes(command, folder, COVER_TEST_DEVICE=device)
    print("\n== summary")
    print("\n".join(f"{'passed' if passed else 'FAILED'}  {name}" for name, passed in verdicts.items()))
    if not any("compute-sanitizer" in name for name in verdicts):
        print("not run compute-sanitizer: " + ("the device is the CPU" if device == "cpu" else "it is not on the PATH"))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
