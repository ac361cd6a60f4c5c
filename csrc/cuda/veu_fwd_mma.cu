// VEU's forward on tensor cores, for bfloat16 and float16: v and the log-sum-exp of each group, as in veu_fwd.cu.
//
// One `mma` multiplies 16 keys with 8 queries. The keys are two columns of 8 rows, the queries a patch of 2 x 4 voxels
// (N = 7) or 4 x 2, so that a patch sees no more than those 8 rows. Of a patch's scores a lane of the warp then holds
// those of one row of keys with two queries, one above the other. The patch sees a few more than N columns, but of the
// columns n and n + N a query sees one at most: a selection leaves it N scores for each row, and no exponential of an
// offset outside the window along W is taken. Rows outside the window are left out when the lanes' shares of a query
// are put together, once for each group. The patches of a warp lie side by side and share the keys that it loads.
//
// Shared memory holds a plane of the window as a matrix [position, channel]. Behind the channels of a position comes
// its bias, 0 or -inf for a key that takes no part: what the products start from. docs/kernels.md has the count.
#include "mma.cuh"
#include "veu.cuh"

namespace cover {
namespace cuda {
namespace {

constexpr int kWarps = 8, kTileWidth = 16;  // of a block

using Word2 = Vector<uint32_t, 2>;
using Word4 = Vector<uint32_t, 4>;

// What a lane knows of a query: over its row of keys, largest score, sum of the weights and their moments.
struct alignas(16) Share {
  float top, sum, moment_x, moment_z;
};

template <int d, int kC, int kN>
struct MmaCut {
  static constexpr int C = kC, N = kN;
  static constexpr int rows = N == 7 ? 2 : 4, columns = 8 / rows;         // of a patch
  static constexpr int patches = d == 3 && N == 7 ? 2 : 4;                // of a warp: as 128 registers allow
  static constexpr int pairs = (columns + N - 1) / 2;                     // of columns of keys that a patch sees
  static constexpr int warp_pairs = pairs + (patches - 1) * columns / 2;  // that a warp sees
  static constexpr int warps_x = kTileWidth / (patches * columns), tile_height = kWarps / warps_x * rows;
  // Shared memory starts and ends at a multiple of 4 along W, for loads of four neighbours at once.
  static constexpr int margin = 4, slab_columns = kTileWidth + 2 * margin, slab_rows = tile_height - rows + 8;
  // In units of 16 bytes both are odd: 8 neighbours along either axis lie in different banks.
  static constexpr int position = C + 8, row = (slab_columns + 1) * position;
  // Of each query in one warp, in the last step: [patch, upper or lower query, lane]. The lanes that read one after
  // the other meet no bank twice either.
  static constexpr int share_stride = 32 + 4, shares = 2 * patches * share_stride;
  static constexpr int bytes = std::max<int>(slab_rows * row * sizeof(uint16_t), kWarps* shares * sizeof(Share));
};

// The same value, though the compiler cannot tell: what follows from it is worked out where it is used, and takes no
// register in between.
__device__ __forceinline__ int afresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Where a thread stands: the warp's first patch in the tile, and the lane's upper query in each patch.
template <class Cut>
struct Place {
  int lane, warp, y, x, query_y, query_x;

  __device__ __forceinline__ explicit Place(int thread)
      : lane(thread % 32),
        warp(thread / 32),
        y(warp / Cut::warps_x * Cut::rows),
        x(warp % Cut::warps_x * (Cut::patches * Cut::columns)),
        query_y(lane % 4 * 2 % Cut::rows),
        query_x(lane % 4 * 2 / Cut::rows) {}
};

// Four neighbours along W of one channel. kAligned: they are one word of 8 bytes.
template <bool kAligned>
__device__ __forceinline__ Word2 load_four(const uint16_t* at, const bool (&there)[4]) {
  if constexpr (kAligned) {
    return there[0] || there[1] || there[2] || there[3] ? *reinterpret_cast<const Word2*>(at) : Word2{{0, 0}};
  } else {
    uint32_t value[4];
#pragma unroll
    for (int e = 0; e < 4; e++) value[e] = there[e] ? at[e] : 0;
    return {{value[0] | value[1] << 16, value[2] | value[3] << 16}};
  }
}

// Copies rows x columns positions from (y, x) of plane z on into shared memory, 4 positions and some channels of them
// at a time. x is a multiple of 4, columns of 8.
template <class Cut, bool kAligned, int rows, int columns>
__device__ __forceinline__ void load_positions(const Geometry& g, int z, int y, int x,
                                               const uint16_t* image,  // [C, *S]
                                               const bool* mask,       // [*S] or null
                                               uint16_t* slab) {
  // The 8 threads that write at once stand 2 x 4 wide and high, which keeps their positions in different banks.
  constexpr int kPairs = columns / 8, kItems = (rows + 3) / 4 * kPairs * 8, kChannels = kAligned ? 16 : 8;
  const unsigned numel = static_cast<unsigned>(g.numel);
#pragma unroll 1
  for (int i = afresh(threadIdx.x); i < kItems * (Cut::C / kChannels); i += kWarps * 32) {
    const int item = i % kItems, channel = i / kItems * kChannels;
    const int row = item / (8 * kPairs) * 4 + item / 2 % 4, at = (item / 8 % kPairs * 2 + item % 2) * 4;
    if (rows % 4 && row >= rows) continue;
    const int my_y = y + row, my_x = x + at;
    const unsigned voxel = (static_cast<unsigned>(z) * g.H + my_y) * g.W + my_x;
    bool there[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int its_x = kAligned ? my_x : my_x + e;
      there[e] = my_y >= 0 && my_y < g.H && its_x >= 0 && its_x < g.W && (!mask || mask[voxel + e]);
    }
    const uint16_t* from = image + static_cast<uint64_t>(channel) * numel + voxel;
    uint32_t word[4][kChannels / 2];  // two channels of a position
#pragma unroll
    for (int c = 0; c < kChannels / 2; c++) {
      const Word2 a = load_four<kAligned>(from, there), b = load_four<kAligned>(from + numel, there);
#pragma unroll
      for (int e = 0; e < 4; e++) word[e][c] = __byte_perm(a.value[e / 2], b.value[e / 2], e % 2 ? 0x7632 : 0x5410);
      from += 2 * static_cast<uint64_t>(numel);
    }
    uint16_t* to = slab + row * Cut::row + at * Cut::position;
#pragma unroll
    for (int e = 0; e < 4; e++, to += Cut::position) {
#pragma unroll
      for (int c = 0; c < kChannels; c += 8) {
        auto* const words = reinterpret_cast<Word4*>(to + channel + c);
        *words = {{word[e][c / 2], word[e][c / 2 + 1], word[e][c / 2 + 2], word[e][c / 2 + 3]}};
        if (kAligned && mask && !there[e]) *words = {{0, 0, 0, 0}};  // it came along with its neighbours
      }
      const float bias = there[e] ? 0.0f : -kInfinity<float>;
      if (channel == 0) *reinterpret_cast<Vector<float, 2>*>(to + Cut::C) = {{bias, bias}};
    }
  }
}

// The same for rows of any alignment, between barriers.
template <class Cut, int rows, int columns>
__device__ __forceinline__ void load_slab(const Geometry& g, bool aligned, int z, int y, int x,
                                          const uint16_t* image,  // [C, *S]
                                          const bool* mask,       // [*S] or null
                                          uint16_t* slab) {
  __syncthreads();  // nobody reads what was there any more
  if (aligned)
    load_positions<Cut, true, rows, columns>(g, z, y, x, image, mask, slab);
  else
    load_positions<Cut, false, rows, columns>(g, z, y, x, image, mask, slab);
  __syncthreads();
}

// Of the two queries of a lane in a patch, over the lane's row of keys.
template <int d, class Cut>
struct RowSoftmax {
  Share share[2];

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int e = 0; e < 2; e++) share[e] = {kLowest<float> / 2, 0, 0, 0};
  }

  // The scores of the patch with one plane of the window, before their scale.
  __device__ __forceinline__ void add(const float (&score)[Cut::pairs][4], float scale, int query_x,
                                      const float (&offset_x)[Cut::N], float offset_z) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float mine[Cut::N], largest = 0;
#pragma unroll
      for (int n = 0; n < Cut::N; n++) {
        mine[n] = score[n / 2][n % 2 * 2 + e];
        if (n < Cut::columns - 1 && n < query_x) mine[n] = score[(n + Cut::N) / 2][(n + Cut::N) % 2 * 2 + e];
        largest = n == 0 ? mine[n] : max(largest, mine[n]);
      }
      largest = max(share[e].top, largest * scale);
      float row = 0, inner = 0;
#pragma unroll
      for (int n = 0; n < Cut::N; n++) {
        const float weight = power_of_2(mine[n] * scale - largest);
        row = n == 0 ? weight : row + weight;
        if (n == 0) inner = weight * offset_x[n];
        if (n > 0 && n != Cut::N / 2) inner += weight * offset_x[n];  // in the middle it is 0
      }
      if (d == 3) {
        const float decay = power_of_2(share[e].top - largest);
        share[e] = {largest, share[e].sum * decay + row, share[e].moment_x * decay + inner,
                    share[e].moment_z * decay + row * offset_z};
      } else {  // there is one plane
        share[e] = {largest, row, inner, 0};
      }
    }
  }
};

// v and lse, or, where delta is not null, delta alone.
template <class T, int d, class Cut>
__global__ void __launch_bounds__(kWarps * 32, 2)
    veu_fwd_mma_kernel(const Geometry g, bool aligned,    // four neighbours from a multiple of 4 on are one word
                       float scale,                       // times log2(e), above 0
                       float share,                       // of a group: 1 / J
                       const uint16_t* __restrict__ q,    // [B, J*C, *S] of T
                       const uint16_t* __restrict__ k,    // [B, J*C, *S] of T
                       const bool* __restrict__ mask,     // [B, 1, *S] or null
                       float* __restrict__ v,             // [B, d, *S]
                       float* __restrict__ lse,           // [B, J, *S]
                       const float* __restrict__ grad_v,  // [B, d, *S], with delta
                       float* __restrict__ delta) {       // [B, J, *S] or null
  if constexpr (kHasMma) {
    constexpr int N = Cut::N, kSteps = Cut::C / 16;
    extern __shared__ float4 shared[];
    uint16_t* const slab = reinterpret_cast<uint16_t*>(shared);
    const int tile_z = blockIdx.x / (g.ny * g.nx), tile_y = blockIdx.x / g.nx % g.ny * Cut::tile_height,
              tile_x = blockIdx.x % g.nx * kTileWidth;
    const Place<Cut> place(threadIdx.x);
    const int lane = place.lane;
    float offset_x[N];  // of the keys that `add` selects, seen from the first column of the patch
#pragma unroll
    for (int n = 0; n < N; n++) offset_x[n] = n - N / 2 + (n < Cut::columns - 1 && n < place.query_x ? N : 0);

    // What the lane names for load_matrices: a row of queries of two patches, a row of keys of two columns.
    const uint16_t* const query_row = slab + (place.y + lane % 8 % Cut::rows) * Cut::row +
                                      (place.x + lane / 16 * Cut::columns + lane % 8 / Cut::rows) * Cut::position +
                                      lane / 8 % 2 * 8;
    const uint16_t* const first_keys = slab + place.y * Cut::row + (place.x + Cut::margin - N / 2) * Cut::position;
    const uint16_t* const key_row = first_keys + lane % 8 * Cut::row + lane / 8 % 2 * Cut::position + lane / 16 * 8;
    const uint16_t* const bias_row = first_keys + lane / 4 * Cut::row + Cut::C;

    for (int b = blockIdx.y; b < g.B; b += gridDim.y) {
      for (int j = 0; j < g.J; j++) {
        const int64_t first_channel = (b * g.J + j) * Cut::C * g.numel;
        load_slab<Cut, Cut::tile_height, kTileWidth>(g, aligned, tile_z, tile_y, tile_x, q + first_channel, nullptr,
                                                     slab);
        uint32_t query[Cut::patches][kSteps][2];
#pragma unroll
        for (int p = 0; p < Cut::patches; p += 2)
#pragma unroll
          for (int s = 0; s < kSteps; s++) {
            uint32_t value[4];
            load_matrices(query_row + p * Cut::columns * Cut::position + s * 16, value);
#pragma unroll
            for (int e = 0; e < 4; e++) query[p + e / 2][s][e % 2] = value[e];
          }

        RowSoftmax<d, Cut> softmax[Cut::patches];
        const int first_z = d == 2 ? 0 : max(0, tile_z - g.R[0]), last_z = d == 2 ? 0 : min(g.D - 1, tile_z + g.R[0]);
#pragma unroll 1
        for (int z = first_z; z <= last_z; z++) {
          load_slab<Cut, Cut::slab_rows, Cut::slab_columns>(g, aligned, z, tile_y - N / 2, tile_x - Cut::margin,
                                                            k + first_channel, mask ? mask + b * g.numel : nullptr,
                                                            slab);
          float score[Cut::patches][Cut::pairs][4];
#pragma unroll
          for (int pair = 0; pair < Cut::warp_pairs; pair++) {
            float bias[4];
            uint32_t key[kSteps][4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const auto two = *reinterpret_cast<const Vector<float, 2>*>(bias_row + (2 * pair + e) * Cut::position);
              bias[2 * e] = two.value[0], bias[2 * e + 1] = two.value[1];
            }
#pragma unroll
            for (int s = 0; s < kSteps; s++) load_matrices(key_row + 2 * pair * Cut::position + s * 16, key[s]);
#pragma unroll
            for (int p = 0; p < Cut::patches; p++) {
              const int of_patch = pair - p * Cut::columns / 2;
              if (of_patch < 0 || of_patch >= Cut::pairs) continue;
#pragma unroll
              for (int s = 0; s < kSteps; s++)
                mma<T>(key[s], query[p][s], s == 0 ? bias : score[p][of_patch], score[p][of_patch]);
              if (of_patch == Cut::pairs - 1)
                softmax[p].add(score[p], scale, place.query_x, offset_x, static_cast<float>(z - tile_z));
            }
          }
        }

        __syncthreads();  // nobody reads keys any more
        Share* const shares = reinterpret_cast<Share*>(shared) + place.warp * Cut::shares;
#pragma unroll
        for (int p = 0; p < Cut::patches; p++)
#pragma unroll
          for (int e = 0; e < 2; e++) shares[(2 * p + e) * Cut::share_stride + lane] = softmax[p].share[e];
        __syncthreads();

        // The query that this lane finishes: of patch lane / 8 what the lanes with its lane % 4 had, the upper or the
        // lower one.
        const Place<Cut> mine(afresh(threadIdx.x));
        const int my_patch = mine.lane / 8, my_row = mine.query_y + mine.lane / 4 % 2;
        const int my_y = tile_y + mine.y + my_row, my_x = tile_x + mine.x + my_patch * Cut::columns + mine.query_x;
        if (my_patch >= Cut::patches || my_y >= g.H || my_x >= g.W) continue;
        Share row[N];  // of keys that its window sees
        float top = kLowest<float> / 2;
#pragma unroll
        for (int n = 0; n < N; n++) {
          row[n] = shares[mine.lane / 4 * Cut::share_stride + (my_row + n) * 4 + mine.lane % 4];
          top = max(top, row[n].top);
        }
        float sum = 0, moment[3] = {};
#pragma unroll
        for (int n = 0; n < N; n++) {
          const float decay = power_of_2(row[n].top - top), weight = row[n].sum * decay;
          sum += weight;
          moment[0] += row[n].moment_z * decay;
          moment[1] += weight * (n - N / 2);
          moment[2] += row[n].moment_x * decay;
        }
        moment[2] -= sum * mine.query_x;
        const float weight = 1.0f / (sum == 0.0f ? 1.0f : sum);  // 1 where there is no key: the moments are 0 there
        const unsigned voxel = (static_cast<unsigned>(tile_z) * g.H + my_y) * g.W + my_x;
        const int64_t of_group = (b * g.J + j) * g.numel + voxel;
        float along_grad = 0;
#pragma unroll
        for (int axis = 0; axis < d; axis++) {
          const float of_axis = moment[3 - d + axis] * weight;
          const int64_t at = (static_cast<int64_t>(b) * d + axis) * g.numel + voxel;
          if (delta)
            along_grad += of_axis * grad_v[at];
          else
            v[at] = (j == 0 ? 0.0f : v[at]) + of_axis * share;
        }
        if (delta)
          delta[of_group] = along_grad;
        else
          lse[of_group] = sum == 0.0f ? -kInfinity<float> : (top + log2(sum)) * static_cast<float>(kLn2);
      }
    }
  }
}

// (C, N) that have kernels on tensor cores.
#ifndef COVER_VEU_MMA_SIZES
#define COVER_VEU_MMA_SIZES(X) X(16, 3) X(16, 5) X(16, 7) X(32, 3) X(32, 5) X(32, 7)
#endif

template <class T, int d, class Cut>
bool launch(const Veu& a, void* delta) {
  const auto kernel = veu_fwd_mma_kernel<T, d, Cut>;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "veu");
  if (attributes.ptxVersion < kMmaArchitecture) return false;  // what was compiled for this GPU has no tensor cores
  const Geometry g = geometry(a, Cut::tile_height, kTileWidth);
  allow_shared(kernel, Cut::bytes);
  const auto in_words = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Word2) == 0; };
  kernel<<<grid(g, g.B), kWarps * 32, Cut::bytes, current_stream()>>>(
      g, a.S[2] % 4 == 0 && in_words(a.q) && in_words(a.k), static_cast<float>(a.scale * kLog2e),
      static_cast<float>(1.0 / a.J), static_cast<const uint16_t*>(a.q), static_cast<const uint16_t*>(a.k), a.mask,
      static_cast<float*>(a.v), static_cast<float*>(a.lse), static_cast<const float*>(a.grad_v),
      static_cast<float*>(delta));
  check_launch("veu");
  return true;
}

}  // namespace

bool veu_fwd_mma(const Veu& a, void* delta) {
  // The largest score is found before the scale, which must not turn the order round; voxels are numbered in 32 bits.
  const double numel = static_cast<double>(a.S[0]) * a.S[1] * a.S[2];
  if (!(a.scale > 0) || numel > std::numeric_limits<int>::max()) return false;
  bool served = false;
  with_storage(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
#define COVER_VEU_MMA_CASE(C_, N_)               \
  if (a.C == C_ && a.N[1] == N_ && a.N[2] == N_) \
    served = a.d == 2 ? launch<T, 2, MmaCut<2, C_, N_>>(a, delta) : launch<T, 3, MmaCut<3, C_, N_>>(a, delta);
      COVER_VEU_MMA_SIZES(COVER_VEU_MMA_CASE)
#undef COVER_VEU_MMA_CASE
    }
  });
  return served;
}

}  // namespace cuda
}  // namespace cover
