// What the CPU kernels ask of their host: threads, and large pages for large outputs.
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

// Asks for large pages where [p, p + bytes) is not backed by memory yet, if it is long and about to be written whole.
// A tensor of many megabytes is new memory to the process in most calls, and the system hands out 4 KiB at a time:
// that takes longer than to write them.
void prefer_large_pages(void* p, int64_t bytes);

}  // namespace cover
