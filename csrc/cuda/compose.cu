// compose on the GPU: y = residual + Up(flow)(p + residual), one thread for each voxel, the coarse flow being read
// once.
//
// grad_residual is local; grad_flow is added up as sums.cuh says.
#include "host.h"
#include "kernels.cuh"
#include "sample.cuh"
#include "sums.cuh"

namespace cover {
namespace cuda {
namespace {

constexpr int kThreads = 128;

struct Geometry {
  int64_t B;
  Grid fine, coarse;
  int64_t stride[3];
};

Geometry geometry(const Compose& a) {
  return {a.B, {{a.S[0], a.S[1], a.S[2]}}, coarser(a.S, a.stride), {a.stride[0], a.stride[1], a.stride[2]}};
}

// The cell around p + residual(p) on the coarse level, p being voxel number `number` of the fine grid.
template <class A, int d, class T>
__device__ __forceinline__ Cell<A, d> coarse_cell(const Geometry& g,
                                                  const T* residual,  // [d, *S]
                                                  int64_t number) {
  const Voxel p(g.fine, number);
  A position[d];
#pragma unroll
  for (int i = 0; i < d; i++) position[i] = load(residual + i * g.fine.numel() + number);
#pragma unroll
  for (int i = 0; i < d; i++)
    position[i] = coarse_position(static_cast<A>(p.at[3 - d + i]) + position[i], g.stride[3 - d + i]);
  return Cell<A, d>(g.coarse, true, position);
}

template <class T, int d>
__global__ void __launch_bounds__(kThreads) compose_fwd_kernel(const Geometry g,
                                                               const T* __restrict__ flow,      // [B, d, *(S / stride)]
                                                               const T* __restrict__ residual,  // [B, d, *S]
                                                               T* __restrict__ y) {             // [B, d, *S]
  using A = Acc<T>;
  const int64_t numel = g.fine.numel();
  for (int64_t b = blockIdx.y; b < g.B; b += gridDim.y)
    for (int64_t p = first_item(); p < numel; p += items()) {
      const auto cell = coarse_cell<A, d>(g, residual + b * d * numel, p);
#pragma unroll
      for (int i = 0; i < d; i++) {
        const int64_t at = (b * d + i) * numel + p;
        const A up = cell.sample(flow + (b * d + i) * g.coarse.numel());
        store(y + at, load(residual + at) + static_cast<A>(g.stride[3 - d + i]) * up);
      }
    }
}

template <class T, int d, class Sums>
__global__ void __launch_bounds__(kThreads) compose_bwd_kernel(const Geometry g,
                                                               const T* __restrict__ grad_y,    // [B, d, *S]
                                                               const T* __restrict__ flow,      // [B, d, *(S / stride)]
                                                               const T* __restrict__ residual,  // [B, d, *S]
                                                               Sums grad_flow,  // of [B, d, *(S / stride)]
                                                               T* __restrict__ grad_residual) {  // [B, d, *S]
  using A = Acc<T>;
  grad_flow.prepare();
  const int64_t numel = g.fine.numel();
  for (int64_t b = blockIdx.y; b < g.B; b += gridDim.y)
    for (int64_t p = first_item(); p < numel; p += items()) {
      const auto cell = coarse_cell<A, d>(g, residual + b * d * numel, p);
      A products[cell.kCorners] = {};
#pragma unroll
      for (int i = 0; i < d; i++) {
        // the displacements were multiplied by the stride of their axis
        const A grad = static_cast<A>(g.stride[3 - d + i]) * load(grad_y + (b * d + i) * numel + p);
        cell.sample_bwd(flow, (b * d + i) * g.coarse.numel(), grad, grad_flow, products);
      }
#pragma unroll
      for (int i = 0; i < d; i++) {
        const int64_t at = (b * d + i) * numel + p;
        const A moved = cell.position_gradient(products, i) / static_cast<A>(g.stride[3 - d + i]);
        store(grad_residual + at, load(grad_y + at) + moved);
      }
    }
}

// Calls f with a null pointer of the storage type and d as a constant.
template <class F>
void with_types(const Compose& a, const F& f) {
  with_storage(a.dtype, [&](auto* type) {
    a.d == 2 ? f(type, std::integral_constant<int, 2>()) : f(type, std::integral_constant<int, 3>());
  });
}

}  // namespace

void compose_fwd(const Compose& a) {
  const Geometry g = geometry(a);
  with_types(a, [&](auto* type, auto d) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 blocks = blocks_for(g.fine.numel(), kThreads, g.B);
    compose_fwd_kernel<T, decltype(d)::value><<<blocks, kThreads, 0, current_stream()>>>(
        g, static_cast<const T*>(a.flow), static_cast<const T*>(a.residual), static_cast<T*>(a.y));
    check_launch("compose");
  });
}

int64_t compose_bwd_workspace(const Compose& a) {
  return sums_bytes(a.dtype, a.B * a.d * geometry(a).coarse.numel(), a.deterministic);
}

void compose_bwd(const Compose& a) {
  const Geometry g = geometry(a);
  const int64_t numel = g.fine.numel();
  // a voxel adds to a corner at most once in each component, with a weight of at most 1, and times the stride
  const int64_t room = numel * std::max(std::max(a.stride[0], a.stride[1]), a.stride[2]);
  with_types(a, [&](auto* type, auto d) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* grad_y = static_cast<const T*>(a.grad_y);
    accumulate("compose", static_cast<T*>(a.grad_flow), g.B * a.d * g.coarse.numel(), grad_y, g.B * a.d * numel, room,
               a.deterministic, a.workspace, [&](auto sums) {
                 const dim3 blocks = blocks_for(numel, kThreads, g.B);
                 compose_bwd_kernel<T, decltype(d)::value, decltype(sums)><<<blocks, kThreads, 0, current_stream()>>>(
                     g, grad_y, static_cast<const T*>(a.flow), static_cast<const T*>(a.residual), sums,
                     static_cast<T*>(a.grad_residual));
                 check_launch("compose");
               });
  });
}

}  // namespace cuda
}  // namespace cover
