// VEU on the GPU: what its forward and its backward share, the cut into tiles and the key rows in shared memory.
//
// A block of 8 x 16 threads owns a tile of voxels of one plane, a thread Q neighbours along W. For each plane of the
// window, the keys that the tile sees are copied into shared memory with their halo, a line for each channel: a thread
// reads Q + N - 1 neighbouring values of a channel as vectors, and each value serves up to Q of its voxels: 12 words
// for 28 pairs of voxels at Q = 4 and N = 7. The scores of a row of the window stay in registers. The lines beyond the
// channels hold what else a neighbour brings along. docs/kernels.md has the count.
//
// A kernel is compiled for C channels and windows N wide along H and W ("whole"), for the usual sizes. Any other call
// is served by the same source with a few channels and offsets of one row of the window at a time.
#pragma once

#include <limits>

#include "host.h"
#include "kernels.cuh"
#include "types.cuh"

namespace cover {
namespace cuda {
namespace {

constexpr int kThreadsX = 8, kThreadsY = 16, kThreads = kThreadsX * kThreadsY;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// How a kernel is cut: channels in shared memory at a time, offsets along W at a time, voxels of a thread.
template <int kC, int kN, int kQ, bool kIsWhole>
struct Cut {
  static constexpr int C = kC, N = kN, Q = kQ;
  static constexpr bool whole = kIsWhole;
  static constexpr int rows = whole ? N : 1;                // of the window at a time
  static constexpr int slab_rows = kThreadsY + rows - 1;    // in shared memory
  static constexpr int span = (Q + N - 1 + Q - 1) / Q * Q;  // neighbours along W that a thread reads, in vectors of Q
  static constexpr int width = (kThreadsX - 1) * Q + span;  // of a line in shared memory

  // Along W: of number n of a row that starts at ox. Around the middle of a whole window it is a constant.
  template <class A>
  __host__ __device__ static constexpr A offset(A ox, int n) {
    return whole ? static_cast<A>(n - N / 2) : ox + static_cast<A>(n);
  }

  // From row to row with `extra` lines beyond the channels. Half a turn of the 32 banks apart, so that two rows of
  // threads that read 8 words each vector do not meet.
  __host__ __device__ static constexpr int row_stride(int extra) { return ((C + extra) * width + 15) / 32 * 32 + 16; }
};

// Voxels of a thread: as many as leave room for what it holds of each channel, twice in a backward.
template <int C, int N, bool backward>
using Whole = Cut<C, N, (backward ? 2 * C : C) <= 16 ? 4 : 2, true>;
template <class T>
using Any = std::conditional_t<std::is_same_v<T, double>, Cut<4, 5, 2, false>, Cut<8, 5, 4, false>>;

// (C, N) that have kernels of their own. The test harness compiles fewer.
#ifndef COVER_VEU_SIZES
#define COVER_VEU_SIZES(X) X(8, 3) X(8, 5) X(8, 7) X(16, 3) X(16, 5) X(16, 7) X(32, 3) X(32, 5) X(32, 7)
#endif

// Calls f with a null pointer of the storage type, d as a constant, and the cut that serves a call.
template <bool backward, class F>
void with_cut(const Veu& a, const F& f) {
  const auto with_dimension = [&](auto* type, auto d) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
#define COVER_VEU_CASE(C_, N_) \
  if (a.C == C_ && a.N[1] == N_ && a.N[2] == N_) return f(type, d, Whole<C_, N_, backward>());
      COVER_VEU_SIZES(COVER_VEU_CASE)
#undef COVER_VEU_CASE
    }
    f(type, d, Any<T>());
  };
  with_storage(a.dtype, [&](auto* type) {
    a.d == 2 ? with_dimension(type, std::integral_constant<int, 2>())
             : with_dimension(type, std::integral_constant<int, 3>());
  });
}

// Sizes, and the cut of the voxels into tiles. Addresses are 64-bit; within an axis 32 bits do, and save registers, as
// does what the host works out.
struct Geometry {
  int64_t J, C, numel;  // numel: voxels of an image
  int B, D, H, W;
  int R[3];           // the window's radii
  int ny, nx, tiles;  // tiles along H, along W and of an image
};

inline Geometry geometry(const Veu& a, int tile_height, int tile_width) {
  int S[3], R[3];
  for (int64_t size : {a.B, a.S[0], a.S[1], a.S[2]})
    if (size > 1 << 30)
      throw std::runtime_error("veu: the batch and each axis may be 2^30 long on a GPU, got " + std::to_string(size));
  for (int i = 0; i < 3; i++) {
    S[i] = static_cast<int>(a.S[i]);
    // a window wider than the image sees no more than one as wide as the image
    R[i] = static_cast<int>(std::min((a.N[i] - 1) / 2, a.S[i] - 1));
  }
  const int ny = (S[1] + tile_height - 1) / tile_height, nx = (S[2] + tile_width - 1) / tile_width;
  const int64_t tiles = static_cast<int64_t>(S[0]) * ny * nx;
  if (tiles > std::numeric_limits<int>::max())
    throw std::runtime_error("veu: an image may have 2^31 - 1 tiles on a GPU, got " + std::to_string(tiles));
  return {a.J, a.C, a.S[0] * a.S[1] * a.S[2], static_cast<int>(a.B), S[0], S[1], S[2], {R[0], R[1], R[2]},
          ny,  nx,  static_cast<int>(tiles)};
}

// A block for each tile, of which a launch may have 2^31 - 1; blocks loop over the images beyond 65535.
inline dim3 grid(const Geometry& g, int64_t images) {
  dim3 blocks = blocks_for(1, 1, images);
  blocks.x = static_cast<unsigned>(g.tiles);
  return blocks;
}

// A tile, by the coordinates of its first voxel, and the voxels of this thread in it.
template <class Cut>
struct Tile {
  int z, y, x;     // of the tile
  int my_y, my_x;  // of this thread's first voxel

  __device__ Tile(const Geometry& g, int number)
      : z(number / (g.ny * g.nx)),
        y(number / g.nx % g.ny * kThreadsY),
        x(number % g.nx * (kThreadsX * Cut::Q)),
        my_y(y + static_cast<int>(threadIdx.y)),
        my_x(x + static_cast<int>(threadIdx.x) * Cut::Q) {}

  __device__ bool inside(const Geometry& g) const { return my_y < g.H && my_x < g.W; }
  __device__ bool has(const Geometry& g, int i) const { return inside(g) && my_x + i < g.W; }
  // Unsigned, for which the upper halves of 64-bit sums are no registers.
  __device__ int64_t first_voxel(const Geometry& g) const {
    return (static_cast<int64_t>(z) * g.H + static_cast<unsigned>(my_y)) * g.W + static_cast<unsigned>(my_x);
  }

  // The rows of a slab that starts at offset oy, between which lie those of the image that this thread's window sees.
  __device__ int first_row(int oy) const { return max(0, -(my_y + oy)); }
  __device__ int last_row(const Geometry& g, int oy) const {
    return inside(g) ? min(static_cast<int>(Cut::rows), g.H - (my_y + oy)) : 0;
  }
};

// 2^x in one instruction. (exp2f would also mind results below 2^-126, which are nothing beside a largest term of 1.)
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_2(double x) {
  return exp2(x);
}

// Calls f(z, oy, ox) for each plane z of the image that the window of a tile reaches, and each part of the window that
// is in shared memory at a time: from offset (oy, ox) on.
template <class Cut, class F>
__device__ __forceinline__ void for_slabs(const Geometry& g, const Tile<Cut>& tile, const F& f) {
  for (int z = max(0, tile.z - g.R[0]); z <= min(g.D - 1, tile.z + g.R[0]); z++) {
    if (Cut::whole) {
      f(z, -(Cut::N / 2), -(Cut::N / 2));
    } else {
      for (int oy = -g.R[1]; oy <= g.R[1]; oy += Cut::rows)
        for (int ox = -g.R[2]; ox <= g.R[2]; ox += Cut::N) f(z, oy, ox);
    }
  }
}

// Q neighbours along W that are loaded at once.
template <class A, int Q>
struct alignas(Q * sizeof(A)) Vector {
  A value[Q];
};

// The neighbours of a thread's voxels on one line of shared memory.
template <class Cut, class A>
__device__ __forceinline__ void read_line(const A* line, A (&value)[Cut::span]) {
#pragma unroll
  for (int i = 0; i < Cut::span; i += Cut::Q) {
    const auto v = *reinterpret_cast<const Vector<A, Cut::Q>*>(line + i);
#pragma unroll
    for (int e = 0; e < Cut::Q; e++) value[i + e] = v.value[e];
  }
}

// Channels c, .. of the thread's own voxels, times `factor`: own [C, Q], zero beyond the image and the last channel.
template <class Cut, class T, class A>
__device__ __forceinline__ void load_own(const Geometry& g, const Tile<Cut>& tile,
                                         const T* image,  // [C, *S]
                                         int64_t c, A factor, A (&own)[Cut::C][Cut::Q]) {
  const int64_t first = tile.first_voxel(g);
#pragma unroll
  for (int i = 0; i < Cut::C; i++)
#pragma unroll
    for (int e = 0; e < Cut::Q; e++) {
      const bool there = tile.has(g, e) && (Cut::whole || c + i < g.C);
      own[i][e] = there ? load(image + (c + i) * g.numel + first + e) * factor : A(0);
    }
}

// Copies the rows of plane z from (oy, ox) relative to the tile on into shared memory. For each of their positions,
// `column(number of the voxel or -1 outside the image, address of its first line)` fills in the lines.
template <class Cut, class A, class Column>
__device__ __forceinline__ void load_slab(const Geometry& g, const Tile<Cut>& tile, int z, int oy, int ox,
                                          int row_stride, A* slab, const Column& column) {
  const int y = tile.y + oy, x = tile.x + ox;
  const int64_t first = (static_cast<int64_t>(z) * g.H + y) * g.W + x;
  __syncthreads();  // nobody reads what was there any more
#pragma unroll 1
  for (int i = threadIdx.y * kThreadsX + threadIdx.x; i < Cut::slab_rows * Cut::width; i += kThreads) {
    const int row = i / Cut::width, at = i % Cut::width;
    const bool inside = y + row >= 0 && y + row < g.H && x + at >= 0 && x + at < g.W;
    column(inside ? first + static_cast<int64_t>(row) * g.W + at : -1, slab + row * row_stride + at);
  }
  __syncthreads();
}

// Channels c, .. of a neighbour, for load_slab: zero where it takes no part.
template <class Cut, class T, class A>
__device__ __forceinline__ void load_column(const Geometry& g,
                                            const T* image,  // [C, *S]
                                            int64_t c, int64_t voxel, bool takes_part, A* lines) {
  image += c * g.numel + voxel;
#pragma unroll
  for (int i = 0; i < Cut::C; i++) {
    lines[i * Cut::width] = takes_part && (Cut::whole || c + i < g.C) ? load(image) : A(0);
    image += g.numel;
  }
}

// A key, for load_slab: its channels, then its bias, 0 or -inf where it takes no part. What such a key holds (a NaN,
// say) reaches no sum.
template <class Cut, class T, class A>
__device__ __forceinline__ void load_key(const Geometry& g,
                                         const T* k,        // [C, *S]
                                         const bool* mask,  // [*S] or null
                                         int64_t c, int64_t voxel, A* lines) {
  const bool takes_part = voxel >= 0 && (!mask || mask[voxel]);
  load_column<Cut>(g, k, c, voxel, takes_part, lines);
  lines[Cut::C * Cut::width] = takes_part ? A(0) : -kInfinity<A>;
}

// score[q][n] += <own voxel q, its neighbour at offset n>, over the channels in shared memory.
template <class Cut, class A>
__device__ __forceinline__ void add_products(const A (&own)[Cut::C][Cut::Q], const A* lines,
                                             A (&score)[Cut::Q][Cut::N]) {
#pragma unroll
  for (int c = 0; c < Cut::C; c++) {
    A other[Cut::span];
    read_line<Cut>(lines + c * Cut::width, other);
#pragma unroll
    for (int n = 0; n < Cut::N; n++)
#pragma unroll
      for (int q = 0; q < Cut::Q; q++) score[q][n] += own[c][q] * other[q + n];
  }
}

// Excludes the offsets that a last chunk has beyond the window.
template <class Cut, class A>
__device__ __forceinline__ void exclude_beyond(int offsets, A (&score)[Cut::Q][Cut::N]) {
#pragma unroll
  for (int n = 0; n < Cut::N; n++)
#pragma unroll
    for (int q = 0; q < Cut::Q; q++)
      if (!Cut::whole && n >= offsets) score[q][n] = -kInfinity<A>;
}

// Lets a kernel have the shared memory that it wants; an error that says how much where the device has less.
template <class Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  int device, most;
  check(cudaGetDevice(&device), "veu");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "veu");
  if (bytes > most)
    throw std::runtime_error("veu: a block needs " + std::to_string(bytes) +
                             " bytes of shared memory, the device has " + std::to_string(most));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "veu");
}

}  // namespace

// The forward on tensor cores; false where they do not serve. The rest is that of veu_fwd or, with delta, of veu_delta.
bool veu_fwd_mma(const Veu& a, void* delta);

// delta [B, J, *S] acc, <g, v_j> for each voxel and group: what the backward needs of each group's own v.
void veu_delta(const Veu& a, void* delta);

}  // namespace cuda
}  // namespace cover
