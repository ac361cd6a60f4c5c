// The part of NVIDIA's cuda_runtime.h that the project's kernels use, for g++.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

// Set by the runtime before a thread goes on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {
void barrier(int line);

// What a lane hands to its warp in an instruction that all 32 lanes execute together.
struct Message {
  uint32_t word[16];
};
enum class Together { shuffle, load_matrices, mma };

// Waits for all lanes of the warp; their messages [32] are there until the lane's next call. Memory is not ordered.
const Message* exchange(Together instruction, const Message& mine);
unsigned lane();
}  // namespace cuda_on_cpu
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)

// Of a full warp: the mask must name all 32 lanes.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) throw std::logic_error("only shuffles of a full warp are played");
  cuda_on_cpu::Message message{};
  static_assert(sizeof(T) <= sizeof(message));
  std::memcpy(&message, &value, sizeof(T));
  const auto* const of_lane = cuda_on_cpu::exchange(cuda_on_cpu::Together::shuffle, message);
  std::memcpy(&value, of_lane + (cuda_on_cpu::lane() ^ lane_mask), sizeof(T));
  return value;
}

// Two words of 16 bits of b:a; of the selectors those that take halves as they are.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  switch (selector) {
    case 0x5410: return (a & 0xffff) | b << 16;
    case 0x7632: return a >> 16 | (b & 0xffff0000);
    default: throw std::logic_error("__byte_perm: this selector is not played");
  }
}

using std::ilogb;
using std::isfinite;
using std::llrint;
using std::max;
using std::min;
using std::scalbn;

template <class T>
T atomicAdd(T* address, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do {
      after = before + value;
    } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
  }
}

template <class T>
T atomicMax(T* address, T value) {
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value &&
         !__atomic_compare_exchange_n(address, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  int ptxVersion;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace cuda_on_cpu {
cudaError_t allow_shared_bytes(const void* kernel, int bytes);
int architecture();
}  // namespace cuda_on_cpu
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return cuda_on_cpu::allow_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = cuda_on_cpu::architecture();
  return cudaSuccess;
}

#include "../runtime.h"
