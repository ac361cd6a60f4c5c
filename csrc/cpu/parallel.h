// What the CPU kernels ask of their host: threads.
#pragma once

#include <cstdint>

namespace cover {

// Runs body(begin, end, context) over disjoint ranges that cover [0, n), on the host's threads.
// The host defines it: the torch binding with at::parallel_for, a test harness with a plain loop.
void parallel_for(int64_t n, void (*body)(int64_t begin, int64_t end, const void* context), const void* context);

template <class F>
void parallel_for(int64_t n, const F& f) {
  parallel_for(
      n, [](int64_t begin, int64_t end, const void* context) { (*static_cast<const F*>(context))(begin, end); },
      static_cast<const void*>(&f));
}

}  // namespace cover
