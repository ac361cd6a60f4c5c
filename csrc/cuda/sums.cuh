// A gradient that many threads add to: with floating-point atomics, or in fixed point where the same bits are asked for
// in every run.
//
// A floating-point sum depends on the order of its terms, and the order of atomics is the scheduler's. An integer sum
// does not: each term is rounded to a multiple of 2^-e, where e follows, on the device, from the largest term, such
// that no sum can overflow. Of that largest term 60 - log2(number of terms) bits are kept: 39 in a volume of 128^3.
// double takes a second word for what the first one drops.
#pragma once

#include <cmath>

#include "host.h"
#include "types.cuh"

namespace cover {
namespace cuda {

constexpr int kSumThreads = 256;

// Sums of floating-point numbers in any order.
template <class A>
struct FloatSums {
  A* sums;  // [n]

  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void add(int64_t i, A term) const { atomicAdd(sums + i, term); }
  __device__ __forceinline__ A get(int64_t i) const { return sums[i]; }
};

// Sums in fixed point. A term that is not finite makes its sum NaN: it lifts the sum to 2^62, and all other terms
// together, at most 2^60, leave it above 2^61.
template <class A>
struct FixedSums {
  static constexpr int kWords = std::is_same_v<A, double> ? 2 : 1;
  static constexpr int kBits = 60, kLargestExponent = std::is_same_v<A, double> ? 1022 : 126;
  static constexpr long long kNotFinite = 1ll << 62;
  static constexpr int kBias = 2048;  // of exponents, so that 0 stands for "all terms are 0"

  unsigned long long* words;  // [kWords, n], two's complement
  int64_t n;
  int bits;             // of a term in each word
  const int* exponent;  // of the largest term, with bias: one int on the device
  int e;
  A scale, finer;  // 2^e; 2^bits, by which the second word is finer

  __device__ __forceinline__ void prepare() {
    // the limit bites where the terms are below the smallest normal number
    e = min(*exponent ? bits - 1 - (*exponent - kBias) : 0, kLargestExponent);
    scale = scalbn(A(1), e), finer = scalbn(A(1), bits);
  }

  __device__ __forceinline__ void add(int64_t i, A term) const {
    if (!isfinite(term)) {
      atomicMax(reinterpret_cast<long long*>(words + i), kNotFinite);
      return;
    }
    const long long whole = llrint(term * scale);
    atomicAdd(words + i, static_cast<unsigned long long>(whole));
    if (kWords == 2) {
      const A rest = term * scale - static_cast<A>(whole);
      atomicAdd(words + n + i, static_cast<unsigned long long>(llrint(rest * finer)));
    }
  }

  __device__ __forceinline__ A get(int64_t i) const {
    const long long whole = static_cast<long long>(words[i]);
    if (whole > kNotFinite / 2) return A(NAN);
    A sum = static_cast<A>(whole);
    if (kWords == 2) sum += scalbn(static_cast<A>(static_cast<long long>(words[n + i])), -bits);
    return scalbn(sum, -e);
  }
};

// exponent [1], 0 before: the largest exponent, with bias, among the finite terms [n].
template <class T>
__global__ void __launch_bounds__(kSumThreads) largest_exponent(const T* terms, int64_t n, int* exponent) {
  using A = Acc<T>;
  A largest = 0;
  for (int64_t i = first_item(); i < n; i += items()) {
    const A term = fabs(load(terms + i));
    if (isfinite(term) && term > largest) largest = term;
  }
  int e = largest > A(0) ? ilogb(largest) + FixedSums<A>::kBias : 0;
  for (int lane = 16; lane > 0; lane /= 2) e = max(e, __shfl_xor_sync(0xffffffffu, e, lane));
  if (threadIdx.x % 32 == 0 && e) atomicMax(exponent, e);
}

// out [n] = sums, in the storage type.
template <class T, class Sums>
__global__ void __launch_bounds__(kSumThreads) store_sums(Sums sums, int64_t n, T* __restrict__ out) {
  sums.prepare();
  for (int64_t i = first_item(); i < n; i += items()) store(out + i, sums.get(i));
}

// Bytes of workspace for n sums.
inline int64_t sums_bytes(Dtype dtype, int64_t n, bool deterministic) {
  if (deterministic) return 16 + n * 8 * (dtype == Dtype::f64 ? 2 : 1);
  return dtype == Dtype::bf16 || dtype == Dtype::f16 ? n * 4 : 0;
}

// Sets out [n] to what run(sums) adds up. Terms are at most as large as the largest of `bounds` [n_bounds], and a sum
// never exceeds `room` times that.
template <class T, class Run>
inline void accumulate(const char* op, T* out, int64_t n, const T* bounds, int64_t n_bounds, int64_t room,
                       bool deterministic, void* workspace, const Run& run) {
  using A = Acc<T>;
  const cudaStream_t stream = current_stream();
  const auto zero = [&](void* p, int64_t bytes) { check(cudaMemsetAsync(p, 0, bytes, stream), op); };
  if (deterministic) {
    zero(workspace, sums_bytes(sizeof(A) == 8 ? Dtype::f64 : Dtype::f32, n, true));
    int* exponent = static_cast<int*>(workspace);
    int bits = FixedSums<A>::kBits;
    for (int64_t r = 1; r < room; r *= 2) bits--;
    const FixedSums<A> sums{reinterpret_cast<unsigned long long*>(exponent + 4), n, bits, exponent, 0, A(1), A(1)};
    // a few blocks for each multiprocessor of the largest GPUs: more would only queue at the one exponent
    const unsigned blocks = std::min(blocks_for(n_bounds, kSumThreads), 1024u);
    largest_exponent<T><<<blocks, kSumThreads, 0, stream>>>(bounds, n_bounds, exponent);
    check_launch(op);
    run(sums);
    store_sums<T, FixedSums<A>><<<blocks_for(n, kSumThreads), kSumThreads, 0, stream>>>(sums, n, out);
    check_launch(op);
  } else if constexpr (std::is_same_v<T, A>) {
    zero(out, n * sizeof(A));
    run(FloatSums<A>{out});
  } else {
    zero(workspace, n * sizeof(A));
    const FloatSums<A> sums{static_cast<A*>(workspace)};
    run(sums);
    store_sums<T, FloatSums<A>><<<blocks_for(n, kSumThreads), kSumThreads, 0, stream>>>(sums, n, out);
    check_launch(op);
  }
}

}  // namespace cuda
}  // namespace cover
