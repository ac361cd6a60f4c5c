// The choice of an instruction set, made once, when the first operator runs: the widest that this processor has;
// COVER_KERNELS_ISA = avx512_bf16, avx512, avx2 or generic forces one.
#include "../kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace cover {

#if defined(__x86_64__)
namespace avx512_bf16 {
void fwd_of_pairs(const Veu& a);
void bwd_of_pairs(const Veu& a);
}  // namespace avx512_bf16
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace generic {
extern const Kernels table;
}

#if defined(__x86_64__)
// AVX-512's kernels, but for bfloat16's own.
static Kernels with_pairs() {
  Kernels table = avx512::table;
  table.name = "avx512_bf16";
  table.veu_fwd = [](const Veu& a) {
    a.dtype == Dtype::bf16 ? avx512_bf16::fwd_of_pairs(a) : avx512::table.veu_fwd(a);
  };
  table.veu_bwd = [](const Veu& a) {
    a.dtype == Dtype::bf16 ? avx512_bf16::bwd_of_pairs(a) : avx512::table.veu_bwd(a);
  };
  return table;
}
#endif

static Kernels choose() {
  const char* forced = std::getenv("COVER_KERNELS_ISA");
  const std::string name = forced ? forced : "";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (pairs && (name.empty() || name == "avx512_bf16")) return with_pairs();
  if (avx512 && (name.empty() || name == "avx512")) return avx512::table;
  if (avx2 && (name.empty() || name == "avx2")) return avx2::table;
#endif
  if (name.empty() || name == "generic") return generic::table;
  throw std::runtime_error(
      "COVER_KERNELS_ISA must be avx512_bf16, avx512, avx2 or generic, and within this processor's means; got " + name);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace cover
