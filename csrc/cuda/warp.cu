// warp on the GPU: one thread for each voxel, which brings the coarse flow to its own position, makes its cell once and
// goes through all channels.
//
// Nothing of the fine flow's size is written in the forward. The backward adds to grad_x as sums.cuh says; where the
// flow is coarser, the gradient of each fine voxel's displacement waits in the workspace for a gather, which is
// deterministic and needs no atomics.
#include "host.h"
#include "kernels.cuh"
#include "sample.cuh"
#include "sums.cuh"

namespace cover {
namespace cuda {
namespace {

constexpr int kThreads = 128;

struct Geometry {
  int64_t B, C;
  Grid fine, coarse;
  int64_t stride[3];
  bool border, same_level;
};

Geometry geometry(const Warp& a) {
  Geometry g{a.B, a.C, {{a.S[0], a.S[1], a.S[2]}}, coarser(a.S, a.stride), {}, a.border, true};
  for (int i = 0; i < 3; i++) g.stride[i] = a.stride[i], g.same_level = g.same_level && a.stride[i] == 1;
  return g;
}

// The cell around p + Up(flow)(p), p being voxel number `number` of the fine grid.
template <class A, int d, class F>
__device__ __forceinline__ Cell<A, d> displaced_cell(const Geometry& g,
                                                     const F* flow,  // [d, *(S / stride)]
                                                     int64_t number) {
  const Voxel p(g.fine, number);
  A position[d];
  if (g.same_level) {
#pragma unroll
    for (int i = 0; i < d; i++)
      position[i] = static_cast<A>(p.at[3 - d + i]) + load(flow + i * g.fine.numel() + number);
  } else {
#pragma unroll
    for (int i = 0; i < d; i++) position[i] = coarse_position(static_cast<A>(p.at[3 - d + i]), g.stride[3 - d + i]);
    const Cell<A, d> up(g.coarse, true, position);
#pragma unroll
    for (int i = 0; i < d; i++)
      position[i] = static_cast<A>(p.at[3 - d + i]) +
                    static_cast<A>(g.stride[3 - d + i]) * up.sample(flow + i * g.coarse.numel());
  }
  return Cell<A, d>(g.fine, g.border, position);
}

template <class T, class F, int d>
__global__ void __launch_bounds__(kThreads) warp_fwd_kernel(const Geometry g,
                                                            const T* __restrict__ x,     // [B, C, *S]
                                                            const F* __restrict__ flow,  // [B, d, *(S / stride)]
                                                            T* __restrict__ y) {         // [B, C, *S]
  const int64_t numel = g.fine.numel();
  for (int64_t b = blockIdx.y; b < g.B; b += gridDim.y)
    for (int64_t p = first_item(); p < numel; p += items()) {
      const auto cell = displaced_cell<Acc<T>, d>(g, flow + b * d * g.coarse.numel(), p);
      const int64_t image = b * g.C * numel;
      // independent loads of several channels at a time hide the latency
#pragma unroll(d == 2 ? 4 : 2)
      for (int64_t c = 0; c < g.C; c++) store(y + image + c * numel + p, cell.sample(x + image + c * numel));
    }
}

template <class T, class F, int d, class Sums>
__global__ void __launch_bounds__(kThreads) warp_bwd_kernel(const Geometry g,
                                                            const T* __restrict__ grad_y,   // [B, C, *S]
                                                            const T* __restrict__ x,        // [B, C, *S]
                                                            const F* __restrict__ flow,     // [B, d, *(S / stride)]
                                                            Sums grad_x,                    // of [B, C, *S]
                                                            F* __restrict__ grad_flow,      // [B, d, *S]: same level
                                                            Acc<T>* __restrict__ grad_u) {  // [B, d, *S]: else
  using A = Acc<T>;
  grad_x.prepare();
  const int64_t numel = g.fine.numel();
  for (int64_t b = blockIdx.y; b < g.B; b += gridDim.y)
    for (int64_t p = first_item(); p < numel; p += items()) {
      const auto cell = displaced_cell<A, d>(g, flow + b * d * g.coarse.numel(), p);
      A products[cell.kCorners] = {};
      for (int64_t c = b * g.C; c < (b + 1) * g.C; c++)
        cell.sample_bwd(x, c * numel, load(grad_y + c * numel + p), grad_x, products);
#pragma unroll
      for (int i = 0; i < d; i++) {
        const int64_t at = (b * d + i) * numel + p;
        const A grad = cell.position_gradient(products, i);
        if (g.same_level)
          store(grad_flow + at, grad);
        else
          grad_u[at] = static_cast<A>(g.stride[3 - d + i]) * grad;
      }
    }
}

// The transpose of bringing a flow to the finer level: each coarse voxel gathers from the fine ones between which and
// its neighbours it lies.
template <class A, class F>
__global__ void __launch_bounds__(kThreads) upsample_bwd_kernel(const Geometry g, int d,
                                                                const A* __restrict__ grad_u,  // [B, d, *S]
                                                                F* __restrict__ grad_flow) {   // [B, d, *(S / stride)]
  const int64_t numel = g.coarse.numel();
  for (int64_t item = first_item(); item < g.B * d * numel; item += items()) {
    const int64_t component = item / numel;
    const Voxel c(g.coarse, item % numel);
    int64_t first[3], last[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const int64_t s = g.stride[i], begin = s * c.at[i] - s / 2;
      first[i] = max(begin, int64_t(0)), last[i] = min(begin + s + s / 2 * 2, g.fine.S[i]);
    }
    // The weight of the fine level's voxel p along an axis: twice the distance between both centres, in fine voxels,
    // is a whole number; beyond the last centre the flow is clamped.
    const auto weight = [&](int i, int64_t p) {
      const int64_t s = g.stride[i], distance = 2 * p + 1 - s * (2 * c.at[i] + 1);
      const bool beyond = distance < 0 ? c.at[i] == 0 : c.at[i] == g.coarse.S[i] - 1;
      return beyond ? A(1) : A(1) - fabs(static_cast<A>(distance)) * (A(0.5) / static_cast<A>(s));
    };
    A sum = 0;
    for (int64_t z = first[0]; z < last[0]; z++)
      for (int64_t y = first[1]; y < last[1]; y++) {
        const A outer = weight(0, z) * weight(1, y);
        const A* row = grad_u + ((component * g.fine.S[0] + z) * g.fine.S[1] + y) * g.fine.S[2];
        for (int64_t x = first[2]; x < last[2]; x++) sum += outer * weight(2, x) * row[x];
      }
    store(grad_flow + item, sum);
  }
}

// Calls f with null pointers of the types of x and flow, and d as a constant.
template <class F>
void with_types(const Warp& a, const F& f) {
  with_storage(a.dtype, [&](auto* x) {
    Acc<std::remove_pointer_t<decltype(x)>>* acc = nullptr;
    const auto with_flow = [&](auto* flow) {
      a.d == 2 ? f(x, flow, std::integral_constant<int, 2>()) : f(x, flow, std::integral_constant<int, 3>());
    };
    a.flow_dtype == a.dtype ? with_flow(x) : with_flow(acc);
  });
}

// grad_u comes first in the workspace, then the sums.
int64_t grad_u_bytes(const Warp& a) {
  const Geometry g = geometry(a);
  return g.same_level ? 0 : (a.B * a.d * g.fine.numel() * acc_bytes(a.dtype) + 15) / 16 * 16;
}

}  // namespace

void warp_fwd(const Warp& a) {
  const Geometry g = geometry(a);
  with_types(a, [&](auto* x, auto* flow, auto d) {
    using T = std::remove_pointer_t<decltype(x)>;
    using F = std::remove_pointer_t<decltype(flow)>;
    const dim3 blocks = blocks_for(g.fine.numel(), kThreads, g.B);
    warp_fwd_kernel<T, F, decltype(d)::value><<<blocks, kThreads, 0, current_stream()>>>(
        g, static_cast<const T*>(a.x), static_cast<const F*>(a.flow), static_cast<T*>(a.y));
    check_launch("warp");
  });
}

int64_t warp_bwd_workspace(const Warp& a) {
  return grad_u_bytes(a) + sums_bytes(a.dtype, a.B * a.C * geometry(a).fine.numel(), a.deterministic);
}

void warp_bwd(const Warp& a) {
  const Geometry g = geometry(a);
  const int64_t numel = g.fine.numel();
  void* sums_workspace = static_cast<char*>(a.workspace) + grad_u_bytes(a);
  with_types(a, [&](auto* x, auto* flow, auto d) {
    using T = std::remove_pointer_t<decltype(x)>;
    using F = std::remove_pointer_t<decltype(flow)>;
    using A = Acc<T>;
    const T* grad_y = static_cast<const T*>(a.grad_y);
    A* grad_u = static_cast<A*>(a.workspace);
    F* grad_flow = static_cast<F*>(a.grad_flow);
    // a voxel adds to a corner at most once in each channel, with a weight of at most 1
    accumulate("warp", static_cast<T*>(a.grad_x), g.B * g.C * numel, grad_y, g.B * g.C * numel, numel, a.deterministic,
               sums_workspace, [&](auto sums) {
                 const dim3 blocks = blocks_for(numel, kThreads, g.B);
                 warp_bwd_kernel<T, F, decltype(d)::value, decltype(sums)><<<blocks, kThreads, 0, current_stream()>>>(
                     g, grad_y, static_cast<const T*>(a.x), static_cast<const F*>(a.flow), sums, grad_flow, grad_u);
                 check_launch("warp");
               });
    if (g.same_level) return;
    const unsigned blocks = blocks_for(g.B * a.d * g.coarse.numel(), kThreads);
    upsample_bwd_kernel<A, F><<<blocks, kThreads, 0, current_stream()>>>(g, static_cast<int>(a.d), grad_u, grad_flow);
    check_launch("warp");
  });
}

}  // namespace cuda
}  // namespace cover
