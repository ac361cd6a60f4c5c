// VEU's backward on the GPU: two gathers, so that no two threads ever add to the same place and every run gives the
// same bits (derivation: docs/derivations.md). For a query p, its key p + o and each group,
//
//   ds = w (<g(p), o> - delta_j(p)),  grad_q(p) = scale / J sum_o ds k(p + o),  grad_k(p + o) = scale / J sum_p ds q(p)
//
// with the weights w = 2^(s - lse) made again. delta_j = <g, v_j> comes first, into the workspace: from the saved v
// where there is one group, by the forward's kernel where there are several.
//
// Both gathers are one kernel. A thread owns neighbouring voxels, of the queries or of the keys, and the others pass
// through shared memory. Where the channels come in chunks, each chunk of the gradient takes a sweep of its own over
// the window, in which the products of all channels are made again.
#include "veu.cuh"

namespace cover {
namespace cuda {
namespace {

enum class Of { queries, keys };

// The lines of a slab beyond the channels: a key's bias, or a query's -lse, delta and g.
template <Of of, int d>
constexpr int kExtra = of == Of::queries ? 1 : 2 + d;

// Of a query, in base 2; -inf where it has no key, or is none: 2^(s - inf) = 0 for every s.
template <class A>
__device__ __forceinline__ A minus_lse(bool there,
                                       const A* lse,  // [*S]
                                       int64_t voxel) {
  return !there || lse[voxel] == -kInfinity<A> ? -kInfinity<A> : -lse[voxel] * static_cast<A>(kLog2e);
}

// What a thread holds of its own queries besides their channels; nothing of its own keys.
template <class A, int d, class Cut>
struct Own {
  A minus_lse[Cut::Q], delta[Cut::Q], g[d][Cut::Q];
};

// The scores of a row become ds: own queries. The first offset is (oz, oy, ox).
template <class Cut, int d, class A>
__device__ __forceinline__ void scores_to_ds(const Own<A, d, Cut>& own, A oz, A oy, A ox, A (&score)[Cut::Q][Cut::N]) {
#pragma unroll
  for (int i = 0; i < Cut::Q; i++) {
    A outer = own.g[d - 2][i] * oy - own.delta[i];
    if (d == 3) outer += own.g[0][i] * oz;
#pragma unroll
    for (int n = 0; n < Cut::N; n++)
      score[i][n] = power_of_2(score[i][n]) * (outer + own.g[d - 1][i] * Cut::offset(ox, n));
  }
}

// The same for own keys: the queries' lines are in shared memory, and the offset is that from a query to the key.
template <class Cut, int d, class A>
__device__ __forceinline__ void scores_to_ds(const A* lines,  // delta, g
                                             A oz, A oy, A ox, A (&score)[Cut::Q][Cut::N]) {
  A outer[Cut::span], g[Cut::span];
  read_line<Cut>(lines, outer);
  read_line<Cut>(lines + (d - 1) * Cut::width, g);
#pragma unroll
  for (int i = 0; i < Cut::span; i++) outer[i] = -outer[i] - g[i] * oy;
  if (d == 3) {
    read_line<Cut>(lines + Cut::width, g);
#pragma unroll
    for (int i = 0; i < Cut::span; i++) outer[i] -= g[i] * oz;
  }
  read_line<Cut>(lines + d * Cut::width, g);
#pragma unroll
  for (int i = 0; i < Cut::Q; i++)
#pragma unroll
    for (int n = 0; n < Cut::N; n++)
      score[i][n] = power_of_2(score[i][n]) * (outer[i + n] - g[i + n] * Cut::offset(ox, n));
}

template <class T, int d, class Cut, Of of>
__global__ void __launch_bounds__(kThreads, Cut::C == 8 && Cut::whole ? 3 : 2)
    veu_bwd_kernel(const Geometry g, Acc<T> scale,        // times log2(e)
                   Acc<T> grad_scale,                     // scale / J
                   const T* __restrict__ own_features,    // [B, J*C, *S], q or k
                   const T* __restrict__ other_features,  // [B, J*C, *S], k or q
                   const bool* __restrict__ mask,         // [B, 1, *S] or null
                   const Acc<T>* __restrict__ lse,        // [B, J, *S]
                   const Acc<T>* __restrict__ delta,      // [B, J, *S]
                   const Acc<T>* __restrict__ grad_v,     // [B, d, *S]
                   T* __restrict__ grad) {                // [B, J*C, *S], grad_q or grad_k
  using A = Acc<T>;
  constexpr int kRowStride = Cut::row_stride(kExtra<of, d>);
  extern __shared__ float4 shared[];
  A* const slab = reinterpret_cast<A*>(shared);
  const A* const my_rows = slab + threadIdx.y * kRowStride + threadIdx.x * Cut::Q;
  const int64_t numel = g.numel;
  const Tile<Cut> tile(g, blockIdx.x);
  for (int64_t image = blockIdx.y; image < g.B * g.J; image += gridDim.y) {  // of a group
    const int64_t b = image / g.J;
    const T* const mine = own_features + image * g.C * numel;
    const T* const others = other_features + image * g.C * numel;
    const bool* const image_mask = mask ? mask + b * numel : nullptr;
    const A* const image_lse = lse + image * numel;
    const A* const image_delta = delta + image * numel;
    const A* const image_grad_v = grad_v + b * d * numel;
    Own<A, d, Cut> own;
    if (of == Of::queries) {
#pragma unroll
      for (int i = 0; i < Cut::Q; i++) {
        const bool there = tile.has(g, i);
        const int64_t voxel = tile.first_voxel(g) + i;
        own.minus_lse[i] = minus_lse(there, image_lse, voxel);
        own.delta[i] = there ? image_delta[voxel] : A(0);
#pragma unroll
        for (int axis = 0; axis < d; axis++) own.g[axis][i] = there ? image_grad_v[axis * numel + voxel] : A(0);
      }
    }
    for (int64_t out = 0; out < (Cut::whole ? 1 : g.C); out += Cut::C) {
      A sum[Cut::C][Cut::Q] = {}, features[Cut::C][Cut::Q];
      if (Cut::whole) load_own(g, tile, mine, 0, scale, features);
      for_slabs(g, tile, [&](int z, int oy, int ox) {
        const A offset_z = static_cast<A>(z - tile.z), offset_y = static_cast<A>(oy), offset_x = static_cast<A>(ox);
        A score[Cut::Q][Cut::N];
        // the chunk of `out` comes last: it is then still in shared memory
        int64_t c = out;
        bool first = true;
        do {
          c = Cut::whole || c + Cut::C >= g.C ? 0 : c + Cut::C;
          if (!Cut::whole) load_own(g, tile, mine, c, scale, features);
          load_slab(g, tile, z, oy, ox, kRowStride, slab, [&](int64_t voxel, A* lines) {
            if (of == Of::queries) {
              load_key<Cut>(g, others, image_mask, c, voxel, lines);
            } else {
              const bool there = voxel >= 0;
              load_column<Cut>(g, others, c, voxel, there, lines);
              lines += Cut::C * Cut::width;
              lines[0] = minus_lse(there, image_lse, voxel);
              lines[Cut::width] = there ? image_delta[voxel] : A(0);
#pragma unroll
              for (int axis = 0; axis < d; axis++)
                lines[(2 + axis) * Cut::width] = there ? image_grad_v[axis * numel + voxel] : A(0);
            }
          });
#pragma unroll 1
          for (int row = tile.first_row(oy); row < tile.last_row(g, oy); row++) {
            const A* const lines = my_rows + row * kRowStride;
            if (first) {
              // a key's bias, or -lse of a query
              A start[Cut::span];
              read_line<Cut>(lines + Cut::C * Cut::width, start);
#pragma unroll
              for (int n = 0; n < Cut::N; n++)
#pragma unroll
                for (int i = 0; i < Cut::Q; i++)
                  score[i][n] = of == Of::queries ? start[i + n] + own.minus_lse[i] : start[i + n];
            }
            add_products<Cut>(features, lines, score);
            if (!Cut::whole && c != out) continue;
            exclude_beyond<Cut>(g.R[2] - ox + 1, score);
            if constexpr (of == Of::queries)
              scores_to_ds(own, offset_z, offset_y + static_cast<A>(row), offset_x, score);
            else
              scores_to_ds<Cut, d>(lines + (Cut::C + 1) * Cut::width, offset_z, offset_y + static_cast<A>(row),
                                   offset_x, score);
#pragma unroll
            for (int i = 0; i < Cut::C; i++) {
              A other[Cut::span];
              read_line<Cut>(lines + i * Cut::width, other);
#pragma unroll
              for (int n = 0; n < Cut::N; n++)
#pragma unroll
                for (int e = 0; e < Cut::Q; e++) sum[i][e] += score[e][n] * other[e + n];
            }
          }
          first = false;
        } while (!Cut::whole && c != out);
      });
#pragma unroll
      for (int e = 0; e < Cut::Q; e++) {
        if (!tile.has(g, e)) continue;
        const int64_t voxel = tile.first_voxel(g) + e;
        // a key that takes no part may hold anything
        const bool takes_part = of == Of::queries || !image_mask || image_mask[voxel];
#pragma unroll
        for (int i = 0; i < Cut::C; i++)
          if (Cut::whole || out + i < g.C)
            store(grad + (image * g.C + out + i) * numel + voxel, takes_part ? sum[i][e] * grad_scale : A(0));
      }
    }
  }
}

// delta [B, 1, *S] = <grad_v, v>, both [B, d, *S]: of one group.
template <class A>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(int64_t B, int64_t d, int64_t numel, const A* __restrict__ grad_v, const A* __restrict__ v,
                 A* __restrict__ delta) {
  for (int64_t item = first_item(); item < B * numel; item += items()) {
    const int64_t b = item / numel, voxel = item % numel;
    A sum = 0;
    for (int64_t axis = b * d; axis < (b + 1) * d; axis++)
      sum += grad_v[axis * numel + voxel] * v[axis * numel + voxel];
    delta[item] = sum;
  }
}

template <Of of>
void launch(const Veu& a, const void* own, const void* other, void* grad) {
  with_cut<true>(a, [&](auto* type, auto d, auto cut) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using Cut = decltype(cut);
    const Geometry g = geometry(a, kThreadsY, kThreadsX * Cut::Q);
    const auto kernel = veu_bwd_kernel<T, decltype(d)::value, Cut, of>;
    const int bytes = Cut::slab_rows * Cut::row_stride(kExtra<of, decltype(d)::value>) * sizeof(A);
    allow_shared(kernel, bytes);
    kernel<<<grid(g, g.B * g.J), dim3(kThreadsX, kThreadsY), bytes, current_stream()>>>(
        g, static_cast<A>(a.scale * kLog2e), static_cast<A>(a.scale / a.J), static_cast<const T*>(own),
        static_cast<const T*>(other), a.mask, static_cast<const A*>(a.lse), static_cast<const A*>(a.workspace),
        static_cast<const A*>(a.grad_v), static_cast<T*>(grad));
    check_launch("veu");
  });
}

}  // namespace

int64_t veu_bwd_workspace(const Veu& a) {
  return a.B * a.J * a.S[0] * a.S[1] * a.S[2] * acc_bytes(a.dtype);
}

void veu_bwd(const Veu& a) {
  if (a.J > 1) {
    veu_delta(a, a.workspace);
  } else {
    const auto delta = [&](auto* type) {
      using A = std::remove_pointer_t<decltype(type)>;
      const int64_t numel = a.S[0] * a.S[1] * a.S[2];
      delta_kernel<A><<<blocks_for(a.B * numel, kThreads), kThreads, 0, current_stream()>>>(
          a.B, a.d, numel, static_cast<const A*>(a.grad_v), static_cast<const A*>(a.v), static_cast<A*>(a.workspace));
    };
    a.dtype == Dtype::f64 ? delta(static_cast<double*>(nullptr)) : delta(static_cast<float*>(nullptr));
    check_launch("veu");
  }
  launch<Of::queries>(a, a.q, a.k, a.grad_q);
  launch<Of::keys>(a, a.k, a.q, a.grad_k);
}

}  // namespace cuda
}  // namespace cover
