"""What the compiler makes of the CUDA kernels, without a GPU: registers, spills, occupancy, instructions for each pair.

    python benchmarks/budget.py             compares with budget.json; the exit status is 1 where something got worse
    python benchmarks/budget.py --update    writes budget.json anew
    python benchmarks/budget.py --mix       prints also which instructions the inner loops are made of

Needs nvcc, and nvdisasm from the toolkit or from Triton's package. Nothing here is a time: the figures bound what a GPU
can do, and a regression in one of them is a regression whatever the GPU.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
BUDGET = Path(__file__).with_name("budget.json")
FILES = ("veu_fwd", "veu_fwd_mma", "veu_bwd", "warp", "compose")
ARCHITECTURES = (80, 90)
# of a multiprocessor: threads, bytes of shared memory, blocks (CUDA C++ Programming Guide, compute capabilities)
LIMITS = {80: (2048, 164 * 1024, 32), 86: (1536, 100 * 1024, 16), 90: (2048, 228 * 1024, 32)}
REGISTERS = 65536  # of a multiprocessor, given out to warps in units of 256
DTYPES = {"d": "f64", "f": "f32", "13__nv_bfloat16": "bf16", "6__half": "f16"}
VEU = re.compile(
    rf"(veu_fwd|veu_bwd)_kernelI({'|'.join(DTYPES)})Li(\d)E\w*?3CutILi(\d+)ELi(\d+)ELi(\d+)ELb([01])EEE(?:L\w+?OfE(\d))?"
)
VEU_MMA = re.compile(rf"veu_fwd_mma_kernelI({'|'.join(DTYPES)})Li(\d)E\w*?6MmaCutILi\d+ELi(\d+)ELi(\d+)EE")
PROBE = """
#include <cstdio>
#include "veu_fwd_mma.cu"
cudaStream_t cover::cuda::current_stream() { return nullptr; }
int64_t cover::cuda::max_blocks() { return 1; }
using namespace cover::cuda;
template <class Cut> void print(int C, int N, int backward) {
  for (int extra : {1, 4, 5})
    std::printf("%d %d %d %d: %d %d\\n", C, N, backward, extra, kThreads, Cut::slab_rows * Cut::row_stride(extra) * 4);
}
template <int d, int C, int N> void print_mma() {
  using Cut = MmaCut<d, C, N>;
  std::printf("mma %d %d %d: %d %d %d\\n", d, C, N, kWarps * 32, Cut::bytes, Cut::patches);
}
int main() {
#define X(C, N) print<Whole<C, N, false>>(C, N, 0), print<Whole<C, N, true>>(C, N, 1);
  COVER_VEU_SIZES(X)
#undef X
#define X(C, N) print_mma<2, C, N>(), print_mma<3, C, N>();
  COVER_VEU_MMA_SIZES(X)
}
"""


def find(tool: str) -> str | None:
    """nvcc or nvdisasm: on the PATH, or as Triton's package brings it."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool if triton else None
    return shutil.which(tool) or (str(bundled) if bundled and bundled.exists() else None)


def run(*command: str) -> str:
    """Standard output and error of a command, which must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def compiler() -> str:
    """nvcc's release, "13.0"."""
    return re.search(r"release ([\d.]+)", run(find("nvcc"), "--version"))[1]


def with_headers(path: Path) -> list[Path]:
    """A source and all that it includes of the project's."""
    included = re.findall(r'#include "([^"]+)"', path.read_text())
    headers = (p for name in included for p in with_headers((path.parent / name).resolve()))
    return [path, *sorted(set(headers))]


def sources() -> str:
    """SHA-256 of what the figures depend on: the kernels' sources and what they include of the project's."""
    paths = {path.name: path for name in FILES for path in with_headers(CUDA / f"{name}.cu")}
    return hashlib.sha256("\0".join(paths[name].read_text() for name in sorted(paths)).encode()).hexdigest()


def compile_file(name: str, arch: int, sizes: str | None = None) -> tuple[Path, str]:
    """(cubin, ptxas' report) of one source for one architecture, from a cache in the temporary folder.

    `sizes`: the (C, N) that veu gets kernels of its own for, such as "X(8,5) X(8,7)"; the default is the source's.
    """
    macro = "COVER_VEU_MMA_SIZES" if name == "veu_fwd_mma" else "COVER_VEU_SIZES"
    define = f"#define {macro}(X) {sizes}\n" if sizes else ""
    content = [compiler(), str(arch), define, *(p.read_text() for p in with_headers(CUDA / f"{name}.cu"))]
    folder = Path(tempfile.gettempdir()) / "cover_budget" / hashlib.sha256("\0".join(content).encode()).hexdigest()[:20]
    cubin, report = folder / f"{name}.cubin", folder / "report"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / "sizes.h"  # nvcc takes no macro with parameters from its command line
        first.write_text(define)
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-include", str(first)]
        text = run(find("nvcc"), *flags, str(CUDA / f"{name}.cu"), "-o", str(cubin))
        report.write_text(text)
    return cubin, report.read_text()


def resources(report: str) -> dict[str, dict[str, int]]:
    """Mangled name -> registers, spilled bytes and bytes of stack of each kernel, from ptxas -v."""
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        kernels[part.split("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spilled_bytes": int(spilled[2]) + int(spilled[3]),
        }
    return kernels


def inner_loops(cubin: Path) -> dict[str, Counter]:
    """Mangled name -> the instructions, by name, of the loop with a kernel's products, less the loops inside it."""
    loops = {}
    for section in re.split(r"\.section\s+\.text\.", run(find("nvdisasm"), "-c", str(cubin)))[1:]:
        instructions, labels, backward = [], {}, set()
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)(.*)", line):
                instructions.append(found[1].split(".")[0])
                target = re.search(r"`\((\.L_x_\d+)\)", found[2])
                if found[1].startswith("BRA") and target and target[1] in labels:
                    backward.add((labels[target[1]], len(instructions)))
        bodies = []
        for a, b in backward:
            inside = [range(c, d) for c, d in backward if (a, b) != (c, d) and a <= c and d <= b]
            bodies.append(Counter(instructions[i] for i in range(a, b) if not any(i in loop for loop in inside)))
        name = re.match(r"[\w$]+", section)[0]
        loops[name] = max(bodies, key=lambda body: (body["HMMA"], body["FFMA"]), default=Counter())
    return loops


def occupancy(arch: int, registers: int, shared_bytes: int, threads: int) -> float:
    """Share of a multiprocessor's threads that are there at once (the rules of cuda_occupancy.h)."""
    most_threads, most_shared, most_blocks = LIMITS[arch]
    warps = threads // 32
    of_a_warp = (registers * 32 + 255) // 256 * 256
    # a block's shared memory comes in units of 128 bytes, 1 KiB of it for the system
    of_a_block = (shared_bytes + 1024 + 127) // 128 * 128
    # registers belong to one of the four parts of a multiprocessor, so whole warps must fit into each
    by_registers = 4 * (REGISTERS // 4 // of_a_warp) // warps
    blocks = min(most_threads // threads, by_registers, most_shared // of_a_block, most_blocks)
    return blocks * threads / most_threads


def shared_memory() -> dict[str, tuple[int, ...]]:
    """What the sources say of a block: "C N backward lines-beyond-the-channels" -> (threads, bytes of shared memory),
    "mma d C N" -> (threads, bytes, patches of a warp)."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cu"), Path(folder, "probe")
        source.write_text(PROBE)
        run(find("nvcc"), "-std=c++17", f"-I{CUDA}", str(source), "-o", str(program))
        rows = [line.split(":") for line in run(str(program)).splitlines()]
    return {key: tuple(map(int, values.split())) for key, values in rows}


def veu_entry(mangled: str, arch: int, used: dict[str, int], loop: Counter, shared) -> tuple[str, dict] | None:
    """Name and figures of a veu kernel that was compiled for its sizes, and for float32 or bfloat16; else None."""
    if match := VEU_MMA.search(mangled):
        dtype, d, C, N = match.groups()
        kernel, whole = "veu_fwd mma", "1"
        threads, shared_bytes, patches = shared[f"mma {d} {C} {N}"]
        pairs = patches * 8 * int(N) ** 2 / 32  # of a lane in a plane of the window
    elif match := VEU.search(mangled):
        kernel, dtype, d, C, N, Q, whole, of = match.groups()
        pairs = int(Q) * int(N)  # of a thread in one turn of the loop: a row of the window for each of its voxels
        key = f"{C} {N} {int(of is not None)} {2 + int(d) if of == '1' else 1}"
        threads, shared_bytes = shared.get(key, (0, 0))
        kernel += {None: "", "0": " grad_q", "1": " grad_k"}[of]
    if not match or whole != "1" or DTYPES[dtype] not in ("f32", "bf16"):
        return None
    figures = {
        **used,
        "shared_bytes": shared_bytes,
        "occupancy": round(occupancy(arch, used["registers"], shared_bytes, threads), 3),
        "instructions_per_pair": round((loop.total() - loop["NOP"]) / pairs, 2),
        "fma_per_pair": round(loop["FFMA"] / pairs, 2),
        "mix": {name: round(count / pairs, 2) for name, count in loop.most_common() if name != "NOP"},
    }
    return f"{kernel} {DTYPES[dtype]} {d}D C={C} N={N} sm_{arch}", figures


def measure(architectures=ARCHITECTURES, sizes: dict[str, str] | None = None) -> dict[str, dict]:
    """Kernel -> figures: of veu each kernel that was compiled for its sizes, of the rest the worst one of each file.

    `sizes`: file -> what compile_file takes.
    """
    entries, shared = {}, shared_memory()
    for arch in architectures:
        for name in FILES:
            cubin, report = compile_file(name, arch, (sizes or {}).get(name))
            used, worst = resources(report), {"registers": 0, "spilled_bytes": 0}
            loops = inner_loops(cubin) if name.startswith("veu") else {}
            for mangled, figures in used.items():
                if entry := veu_entry(mangled, arch, figures, loops.get(mangled, Counter()), shared):
                    entries.update([entry])
                else:
                    worst = {key: max(worst[key], figures[key]) for key in worst}
            entries[f"{name} others sm_{arch}"] = worst
    return dict(sorted(entries.items()))


def regressions(budget: dict[str, dict], measured: dict[str, dict]) -> list[str]:
    """What is worse than the budget allows: spills, less occupancy, or 2 % more instructions for a pair."""
    found = []
    for name, figures in measured.items():
        allowed = budget.get(name)
        if allowed is None:
            found.append(f"{name}: not in the budget")
            continue
        if figures["spilled_bytes"] > allowed["spilled_bytes"]:
            found.append(f"{name}: {figures['spilled_bytes']} bytes spilled, {allowed['spilled_bytes']} allowed")
        if figures.get("occupancy", 1) < allowed.get("occupancy", 0):
            found.append(f"{name}: occupancy {figures['occupancy']}, was {allowed['occupancy']}")
        if figures.get("instructions_per_pair", 0) > 1.02 * allowed.get("instructions_per_pair", 0):
            was = allowed["instructions_per_pair"]
            found.append(f"{name}: {figures['instructions_per_pair']} instructions for each pair, was {was}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write budget.json anew")
    parser.add_argument("--mix", action="store_true", help="print the instructions for each pair by name")
    arguments = parser.parse_args()
    missing = [tool for tool in ("nvcc", "nvdisasm") if not find(tool)]
    if missing:
        parser.error(f"{' and '.join(missing)} not found")
    measured = measure()
    for name, figures in measured.items():
        mix = figures.pop("mix", {})  # too much for budget.json, whose figures it adds up to
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items())}")
        if arguments.mix and mix:
            print(f"    for each pair: {', '.join(f'{key} {value}' for key, value in mix.items())}")
    if arguments.update:
        lines = (f"    {json.dumps(name)}: {json.dumps(figures)}" for name, figures in measured.items())
        kernels = ",\n".join(lines)
        origin = f'"nvcc": "{compiler()}",\n  "sources": "{sources()}"'
        BUDGET.write_text(f'{{\n  {origin},\n  "kernels": {{\n{kernels}\n  }}\n}}\n')
        return 0
    recorded = json.loads(BUDGET.read_text())
    worse = regressions(recorded["kernels"], measured)
    print("\n".join(worse) or "within the budget")
    if recorded["sources"] != sources():
        print("budget.json was made of other sources: --update writes it anew")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
