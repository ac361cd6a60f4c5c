// The kernels for x86-64 processors with AVX-512 (F, DQ, BW, VL).
#include "isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#define COVER_ISA avx512
#define COVER_ISA_NAME "avx512"
#define COVER_BYTES 64
#define COVER_REGISTERS 32
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
