// The kernels for x86-64 processors with AVX2, FMA and F16C.
#include "isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define COVER_ISA avx2
#define COVER_ISA_NAME "avx2"
#define COVER_BYTES 32
#define COVER_REGISTERS 16
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
