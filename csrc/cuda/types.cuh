// Storage and accumulation types of the CUDA kernels, and the indexing that they share.
//
// Kernels are templates over the storage type T and compute in Acc<T>; addresses are 64-bit throughout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace cover {
namespace cuda {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ Acc<T> load(const T* p) {
  return static_cast<Acc<T>>(*p);
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ void store(T* p, Acc<T> value) {
  *p = static_cast<T>(value);
}

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64: return f(static_cast<double*>(nullptr));
    case Dtype::f32: return f(static_cast<float*>(nullptr));
    case Dtype::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::f16: return f(static_cast<__half*>(nullptr));
  }
}

inline int64_t acc_bytes(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : 4;
}

// A grid of voxels, passed to kernels by value; a 2D one has S[0] = 1.
struct Grid {
  int64_t S[3];
  __host__ __device__ int64_t numel() const { return S[0] * S[1] * S[2]; }
};

// A loop over n items that any launch of one-dimensional blocks shares out: for (i = first_item(); i < n; i +=
// items()).
__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t items() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace cuda
}  // namespace cover
