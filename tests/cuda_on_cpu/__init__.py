"""Runs the project's own CUDA sources (csrc/cuda) on the CPU, so that they are tested where no GPU is.

How it works, in the order in which a source passes through:

    rewrite.py         turns the three CUDA syntaxes that C++ lacks (launches, static and dynamic shared memory) into
                       calls; all else is compiled as it stands.
    include/           what the sources include of NVIDIA's headers, written anew: the built-in variables, atomics, the
                       few calls of the runtime library, half and bfloat16 as storage types. Nothing of NVIDIA's is
                       needed, so the tests run in a bare clone.
    csrc/              what stands for a source that g++ cannot compile: tensor cores' two instructions.
    runtime.cpp        plays a launch: block after block, each CUDA thread a fiber with a stack of its own.
                       __syncthreads() yields to the next thread; when all wait, they go on. Blocks and threads take
                       their turns forward, in reverse or in random order. Shared memory starts as NaN, an array at a
                       time, with poisoned bounds under AddressSanitizer.
    binding.cpp        csrc/kernels.h for numpy (pybind11), as csrc/binding.h is for torch.
    build.py           compiles all of this with g++ into a cached folder: plain, with AddressSanitizer and
                       UndefinedBehaviorSanitizer, or with ThreadSanitizer.
    harness.py         the operators of cover_kernels/schemas.py on top, for torch tensors; recorded calls can be
                       replayed in a process of their own (replay.py), which a sanitizer needs.

What this shows: that indices, masks, tails, barriers and arithmetic are right in every thread, whatever the order in
which threads run between two barriers. ThreadSanitizer is told that each fiber is a thread, that barriers order the
memory of a block and that only the end of a launch orders that of two blocks: it reports a missing barrier even where
the values came out right. What it cannot show: anything about speed, about the hardware's exponential (libm's stands
for it) and how tensor cores round (here: once), or about a lock-step of warps that a source should not rely on anyway.
"""
