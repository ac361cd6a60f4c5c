"""Instructions that a pass of each operator takes, counted by callgrind: the same in every run, whatever else runs.

    python instructions.py                  a table
    python instructions.py --json FILE      also a file that compare.py takes, as it takes the full form's

One thread. Valgrind knows no AVX-512, so what is counted are the AVX2 kernels: the same source but for the exponential.
Needs valgrind with its headers, and a C compiler.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

from cover_kernels.measure import machine, one_pass
from cover_kernels.problems import BACKWARD, FORWARD, Compose, Problem, Veu, Warp

MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""

# small: counts do not depend on the size, and every instruction is simulated
COUNTED = [
    Veu((96, 96), 7),
    Veu((96, 96), 7, channels=32),
    Veu((24, 24), 7, heads=4),
    Veu((24, 24, 24), 5),
    Warp((96, 96), 32),
    Warp((24, 24, 24), 8),
    Warp((24, 24, 24), 8, stride=2),
    Compose((24, 24, 24)),
]


class Unavailable(Exception):
    """Instructions cannot be counted here; the message says what is missing."""


def rows() -> list[tuple[Problem, str]]:
    return [(problem, which) for problem in COUNTED for which in (FORWARD, BACKWARD)]


def count() -> dict[str, int]:
    """Name of a row -> instructions of one call, those of torch's dispatch included. Raises `Unavailable`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not shutil.which("valgrind") or not compiler:
        raise Unavailable("valgrind or a C compiler is not installed")
    with tempfile.TemporaryDirectory() as folder:
        marks, out = Path(folder, "marks.so"), Path(folder, "out")
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", marks]
        compiled = subprocess.run(command, input=MARKS, text=True, capture_output=True)
        if compiled.returncode:
            raise Unavailable("valgrind's headers are not installed")
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, sys.executable, __file__, "--inside", marks], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable(f"valgrind failed: {done.stderr.strip().splitlines()[-1]}")
        counts = {}
        for dump in Path(folder).glob("out.*"):
            text = dump.read_text()
            if found := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE):
                counts[found[1]] = int(re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)[1])
    return {name: counts[name] for name in (f"{problem}, {which}" for problem, which in rows())}


def inside(marks: str) -> None:
    """What runs in valgrind: every row once to warm up, once counted."""
    library = ctypes.CDLL(marks)
    for problem, which in rows():
        call = one_pass(problem, problem.tensors(), which)
        call()
        library.begin()
        call()
        library.end(f"{problem}, {which}".encode())


def units(problem: Problem) -> tuple[int, str]:
    """What instructions are divided by: pairs, or elements of the output."""
    if isinstance(problem, Veu):
        return problem.work(FORWARD).pairs, "pair"
    channels = getattr(problem, "channels", len(problem.S))
    return problem.batch * channels * prod(problem.S), "output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.inside)
        return 0
    try:
        counts = count()
    except Unavailable as reason:
        print(f"instructions: {reason}", file=sys.stderr)
        return 2
    for problem, which in rows():
        number, unit = units(problem)
        found = counts[f"{problem}, {which}"]
        print(f"{f'{problem}, {which}':60}{found:14,}{found / number:9.2f} for each {unit}")
    if arguments.json:
        content = {"cover": {"machine": machine(), "instructions": counts}, "benchmarks": []}
        arguments.json.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
