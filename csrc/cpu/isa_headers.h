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

#include "../kernels.h"
#include "parallel.h"
