// The CPU kernels in torch.ops.cover_kernels_cpu, on torch's threads.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdexcept>

#include "../binding.h"
#include "parallel.h"

namespace cover {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, const void*), const void* context) {
  if (n > 0) torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void prefer_large_pages(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  // whole large pages only: what lies beside the tensor stays as it is
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  // a system that refuses leaves small pages, which are as good but for time
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
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
