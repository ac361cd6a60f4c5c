// veu for bfloat16 on x86-64 processors that multiply pairs of them (AVX512-BF16); kernels.cpp puts it
// in the place of AVX-512's.
#include "isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#define COVER_ISA avx512_bf16
#define COVER_BYTES 64
#define COVER_REGISTERS 32
#define COVER_PAIRS
#include "simd.h"
#include "veu_tiles.h"
#include "veu_fwd.h"
#include "veu_bwd.h"

namespace cover {
namespace avx512_bf16 {

void fwd_of_pairs(const Veu& a);
void fwd_of_pairs(const Veu& a) {
  veu_fwd<float>(a);
}

void bwd_of_pairs(const Veu& a);
void bwd_of_pairs(const Veu& a) {
  veu_bwd<float>(a);
}

}  // namespace avx512_bf16
}  // namespace cover
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
