// The CPU kernels in torch.ops.cover_kernels_cpu, on torch's threads.
#include <stdexcept>

#include "../binding.h"
#include "parallel.h"

namespace cover {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, const void*), const void* context) {
  if (n > 0) torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

struct NoGuard {
  explicit NoGuard(const Tensor&) {}
};

}  // namespace cover

// The instruction set in use, for cover_kernels.backend_info; null if COVER_KERNELS_ISA forces one that is not here.
extern "C" __attribute__((visibility("default"))) const char* cover_kernels_cpu_isa() {
  try {
    return cover::kernels().name;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

COVER_REGISTER(cover_kernels_cpu, CPU, cover::NoGuard)
