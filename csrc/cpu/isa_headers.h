// Every standard header that the kernels use. They come before the compiler's target is changed, so that their code
// stays within the baseline.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "parallel.h"

// Where a call would keep vectors from staying in registers.
#define COVER_INLINE_LAMBDA __attribute__((always_inline))
#define COVER_INLINE __attribute__((always_inline)) inline
