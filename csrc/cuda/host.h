// What the kernels ask of the process that they run in: a stream, the size of a grid, and a report of errors.
//
// Of the CUDA runtime the launchers use nothing but kernel launches, cudaMemsetAsync, cudaFuncGetAttributes,
// cudaFuncSetAttribute, cudaDeviceGetAttribute, cudaGetDevice, cudaGetLastError and cudaGetErrorString. They allocate
// nothing and wait for nothing, so that a call can be captured into a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace cover {
namespace cuda {

// Defined by whoever hosts the kernels: binding.cpp for torch, the test harness on the CPU.
cudaStream_t current_stream();  // of the current device
int64_t max_blocks();           // that one launch may have along x; the hardware takes 2^31 - 1

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// After a launch: reports what the launch itself got wrong.
inline void check_launch(const char* op) {
  check(cudaGetLastError(), op);
}

// Blocks for n items at `per_block` each; kernels loop where that is more than a grid may have.
inline unsigned blocks_for(int64_t n, int64_t per_block) {
  return static_cast<unsigned>(std::min((n + per_block - 1) / per_block, max_blocks()));
}

// The same with the batch along y.
inline dim3 blocks_for(int64_t n, int64_t per_block, int64_t B) {
  return dim3(blocks_for(n, per_block), static_cast<unsigned>(std::min<int64_t>({B, max_blocks(), 65535})));
}

}  // namespace cuda
}  // namespace cover
