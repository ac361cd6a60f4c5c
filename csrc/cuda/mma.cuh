// Two instructions that a whole warp executes together: tensor cores' multiply-add, and the load of what it takes.
//
// A matrix is spread over the warp: lane l = 4 g + t holds, two numbers of 16 bits to a word (PTX ISA, "warp-level
// matrix instructions"),
//   of a [16, 16]: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour
//   of b [16, 8]:  (2t, g), (2t + 8, g), each with the one below it
//   of c [16, 8]:  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), in float
// The test harness plays both between the threads of a warp (tests/cuda_on_cpu/csrc/cuda/mma.cuh).
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.cuh"

namespace cover {
namespace cuda {

// In code for GPUs before sm_80, which lack this size and bfloat16, there is none of it.
constexpr int kMmaArchitecture = 80;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasMma = false;
#else
constexpr bool kHasMma = true;
#endif

// d = a b + c, T: __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                    float (&d)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// Four matrices [8, 8] from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes at a multiple of 16, and
// receives (g, 2t) and (g, 2t + 1) of each.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&value)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

}  // namespace cuda
}  // namespace cover
