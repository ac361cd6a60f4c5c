// A floating-point number of 16 bits, E of them the exponent and M the mantissa, that converts to and from float.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace cuda_on_cpu {

template <int E, int M>
class SmallFloat {
  static constexpr int kBias = (1 << (E - 1)) - 1;
  uint16_t bits;

 public:
  SmallFloat() = default;

  explicit SmallFloat(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0, infinity = ((1 << E) - 1) << M;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) {
      bits = sign | infinity | 1 << (M - 1);
    } else if (std::isinf(value)) {
      bits = sign | infinity;
    } else if (magnitude == 0) {
      bits = sign;
    } else {
      int exponent = std::ilogb(magnitude);
      if (exponent < 1 - kBias) exponent = 1 - kBias;  // below it the spacing of numbers no longer shrinks
      // the mantissa with its leading one, which carries into the exponent where the rounding does
      const int steps = static_cast<int>(std::nearbyint(std::ldexp(double(magnitude), M - exponent)));
      const int number = ((exponent + kBias - 1) << M) + steps;
      bits = sign | static_cast<uint16_t>(number < infinity ? number : infinity);
    }
  }

  operator float() const {
    const int exponent = bits >> M & ((1 << E) - 1), mantissa = bits & ((1 << M) - 1);
    double magnitude;
    if (exponent == (1 << E) - 1)
      magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    else
      magnitude = std::ldexp(mantissa + (exponent ? 1 << M : 0), (exponent ? exponent : 1) - kBias - M);
    return static_cast<float>(bits >> 15 ? -magnitude : magnitude);
  }
};

}  // namespace cuda_on_cpu
