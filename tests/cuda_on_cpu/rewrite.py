"""Turns the CUDA syntax that C++ lacks into calls of runtime.h; line numbers stay.

kernel<T, 2><<<grid, block, bytes, stream>>>(a, b)  ->  cuda_on_cpu::launch(kernel<T, 2>, {grid, ...}, a, b)
extern __shared__ float4 name[];                    ->  auto* name = cuda_on_cpu::dynamic_shared<float4>();
__shared__ T name[8][N];                            ->  auto& name = cuda_on_cpu::shared<T[8][N]>(__COUNTER__);
"""

import re

_DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(r"__shared__\s+([\w:]+)\s+(\w+)\s*((?:\[[^;\]]*\])*)\s*;")


def _kernel_start(source: str, end: int) -> int:
    """Where the name of the kernel begins whose template arguments, if any, end just before `end`."""
    start, depth = end, 0
    while depth or source[start - 1] == ">":
        start -= 1
        depth += {">": 1, "<": -1}.get(source[start], 0)
    while re.match(r"[\w:]", source[start - 1]):
        start -= 1
    return start


def rewrite(source: str) -> str:
    """C++ that means the same as the CUDA `source`."""
    source = _DYNAMIC.sub(r"auto* \2 = cuda_on_cpu::dynamic_shared<\1>();", source)
    source = _STATIC.sub(r"auto& \2 = cuda_on_cpu::shared<\1\3>(__COUNTER__);", source)
    while launch := re.search(r"<<<(.+?)>>>\s*\(", source, re.DOTALL):
        start = _kernel_start(source, launch.start())
        kernel, configuration = source[start : launch.start()], launch.group(1)
        call = f"cuda_on_cpu::launch({kernel}, {{{configuration}}}, "
        source = source[:start] + call + source[launch.end() :]
    return source
