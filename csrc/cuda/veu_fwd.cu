// VEU's forward on the GPU: v and the log-sum-exp of each group.
//
// The softmax is online, in base 2 with scale * log2(e) folded into the queries, and is brought up to date once for
// each row of the window. Along W the moment is added up for each key; along H and D it is the row's sum times the
// row's offset. The groups are summed in registers, so that v is written once.
#include "veu.cuh"

namespace cover {
namespace cuda {
namespace {

template <class A, int d, class Cut>
struct Softmax {
  A top[Cut::Q], sum[Cut::Q], moment[d][Cut::Q];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int q = 0; q < Cut::Q; q++) {
      top[q] = kLowest<A> / 2;  // finite, so that -inf - top is never NaN
      sum[q] = 0;
#pragma unroll
      for (int i = 0; i < d; i++) moment[i][q] = 0;
    }
  }

  // One row of scores; the first of them is at offset (oz, oy, ox).
  __device__ __forceinline__ void add(const A (&score)[Cut::Q][Cut::N], A oz, A oy, A ox) {
#pragma unroll
    for (int q = 0; q < Cut::Q; q++) {
      A largest = top[q], row = 0, inner = 0;
#pragma unroll
      for (int n = 0; n < Cut::N; n++) largest = max(largest, score[q][n]);
      const A decay = power_of_2(top[q] - largest);
#pragma unroll
      for (int n = 0; n < Cut::N; n++) {
        const A weight = power_of_2(score[q][n] - largest);
        row += weight;
        inner += weight * Cut::offset(ox, n);
      }
      top[q] = largest;
      sum[q] = sum[q] * decay + row;
      moment[d - 1][q] = moment[d - 1][q] * decay + inner;
      moment[d - 2][q] = moment[d - 2][q] * decay + row * oy;
      if (d == 3) moment[0][q] = moment[0][q] * decay + row * oz;
    }
  }
};

// v and lse, or, where delta is not null, delta alone.
template <class T, int d, class Cut>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double>   ? 2
                                            : Cut::C > 8 || !Cut::whole ? 3
                                                                        : 4)
    veu_fwd_kernel(const Geometry g, Acc<T> scale,     // times log2(e)
                   Acc<T> share,                       // of a group: 1 / J
                   const T* __restrict__ q,            // [B, J*C, *S]
                   const T* __restrict__ k,            // [B, J*C, *S]
                   const bool* __restrict__ mask,      // [B, 1, *S] or null
                   Acc<T>* __restrict__ v,             // [B, d, *S]
                   Acc<T>* __restrict__ lse,           // [B, J, *S]
                   const Acc<T>* __restrict__ grad_v,  // [B, d, *S], with delta
                   Acc<T>* __restrict__ delta) {       // [B, J, *S] or null
  using A = Acc<T>;
  constexpr int kRowStride = Cut::row_stride(1);  // the channels and the bias
  extern __shared__ float4 shared[];
  A* const slab = reinterpret_cast<A*>(shared);
  const Tile<Cut> tile(g, blockIdx.x);
  for (int64_t b = blockIdx.y; b < g.B; b += gridDim.y) {
    const A* const my_rows = slab + threadIdx.y * kRowStride + threadIdx.x * Cut::Q;
    const bool* const image_mask = mask ? mask + b * g.numel : nullptr;
    A mean[d][Cut::Q] = {};
    for (int j = 0; j < g.J; j++) {
      const T* const queries = q + (b * g.J + j) * g.C * g.numel;
      const T* const keys = k + (b * g.J + j) * g.C * g.numel;
      Softmax<A, d, Cut> softmax;
      A own[Cut::C][Cut::Q];
      load_own(g, tile, queries, 0, scale, own);
      for_slabs(g, tile, [&](int z, int oy, int ox) {
        const A offset_z = static_cast<A>(z - tile.z), offset_y = static_cast<A>(oy), offset_x = static_cast<A>(ox);
        A score[Cut::Q][Cut::N];
        for (int64_t c = 0; c < (Cut::whole ? 1 : g.C); c += Cut::C) {
          if (!Cut::whole && g.C > Cut::C) load_own(g, tile, queries, c, scale, own);
          load_slab(g, tile, z, oy, ox, kRowStride, slab,
                    [&](int64_t voxel, A* lines) { load_key<Cut>(g, keys, image_mask, c, voxel, lines); });
#pragma unroll 1
          for (int row = tile.first_row(oy); row < tile.last_row(g, oy); row++) {
            const A* const lines = my_rows + row * kRowStride;
            if (c == 0) {
              A bias[Cut::span];
              read_line<Cut>(lines + Cut::C * Cut::width, bias);
#pragma unroll
              for (int n = 0; n < Cut::N; n++)
#pragma unroll
                for (int i = 0; i < Cut::Q; i++) score[i][n] = bias[i + n];
            }
            add_products<Cut>(own, lines, score);
            if (!Cut::whole && c + Cut::C < g.C) continue;
            exclude_beyond<Cut>(g.R[2] - ox + 1, score);
            softmax.add(score, offset_z, offset_y + static_cast<A>(row), offset_x);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < Cut::Q; i++) {
        // 1 where there is no key: the moments are 0 there
        const A weight = A(1) / (softmax.sum[i] == A(0) ? A(1) : softmax.sum[i]);
        A along_grad = 0;
        const int64_t voxel = tile.first_voxel(g) + i;
        const bool there = tile.has(g, i);
#pragma unroll
        for (int axis = 0; axis < d; axis++) {
          const A mine = softmax.moment[axis][i] * weight;
          mean[axis][i] += mine;
          if (delta && there) along_grad += mine * grad_v[(b * d + axis) * g.numel + voxel];
        }
        if (!there) continue;
        if (delta)
          delta[(b * g.J + j) * g.numel + voxel] = along_grad;
        else
          lse[(b * g.J + j) * g.numel + voxel] =
              softmax.sum[i] == A(0) ? -kInfinity<A> : (softmax.top[i] + log2(softmax.sum[i])) * static_cast<A>(kLn2);
      }
    }
    if (delta) continue;
#pragma unroll
    for (int i = 0; i < Cut::Q; i++)
#pragma unroll
      for (int axis = 0; axis < d; axis++)
        if (tile.has(g, i)) v[(b * d + axis) * g.numel + tile.first_voxel(g) + i] = mean[axis][i] * share;
  }
}

void launch(const Veu& a, void* delta) {
  if (veu_fwd_mma(a, delta)) return;
  with_cut<false>(a, [&](auto* type, auto d, auto cut) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using Cut = decltype(cut);
    const Geometry g = geometry(a, kThreadsY, kThreadsX * Cut::Q);
    const auto kernel = veu_fwd_kernel<T, decltype(d)::value, Cut>;
    const int bytes = Cut::slab_rows * Cut::row_stride(1) * sizeof(A);
    allow_shared(kernel, bytes);
    kernel<<<grid(g, g.B), dim3(kThreadsX, kThreadsY), bytes, current_stream()>>>(
        g, static_cast<A>(a.scale * kLog2e), static_cast<A>(1.0 / a.J), static_cast<const T*>(a.q),
        static_cast<const T*>(a.k), a.mask, static_cast<A*>(a.v), static_cast<A*>(a.lse),
        static_cast<const A*>(a.grad_v), static_cast<A*>(delta));
    check_launch("veu");
  });
}

}  // namespace

void veu_fwd(const Veu& a) {
  launch(a, nullptr);
}

void veu_delta(const Veu& a, void* delta) {
  launch(a, delta);
}

}  // namespace cuda
}  // namespace cover
