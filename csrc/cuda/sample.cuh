// Linear interpolation on a grid of voxels: the part that warp and compose, forward and backward, share.
//
// A position is turned once into a cell, its 2^d corners with their weights; all channels are then read, or added to,
// through that cell. The twin of csrc/cpu/sample.h; cover_kernels/reference.py says what it must compute.
#pragma once

#include <cmath>

#include "types.cuh"

namespace cover {
namespace cuda {

// The grid that is coarser by a stride.
inline Grid coarser(const int64_t* S, const int64_t* stride) {
  return {{S[0] / stride[0], S[1] / stride[1], S[2] / stride[2]}};
}

// Where a position of a level lies on the level that is coarser by `stride`.
template <class A>
__device__ __forceinline__ A coarse_position(A p, int64_t stride) {
  return stride == 1 ? p : (p + A(0.5)) / static_cast<A>(stride) - A(0.5);
}

// The coordinates of a grid's voxel, from its number.
struct Voxel {
  int64_t at[3];
  __device__ __forceinline__ Voxel(const Grid& g, int64_t number) {
    at[2] = number % g.S[2];
    number /= g.S[2];
    at[1] = number % g.S[1];
    at[0] = number / g.S[1];
  }
};

// The cell around a position. Bit i of a corner, from the highest of d bits on, tells which of the two neighbours along
// axis i it takes.
template <class A, int d>
struct Cell {
  static constexpr int kCorners = 1 << d;
  int64_t index[kCorners];  // within a channel, clamped into the image
  A weight[kCorners];       // 0 outside the image
  A part[d][2];             // the weights' factors along each axis
  A slope[d][2];            // their derivatives

  // position [d], in voxels of `grid`. With `border` it is clamped into the image, else corners outside weigh 0. A NaN
  // position gets NaN weights.
  __device__ __forceinline__ Cell(const Grid& grid, bool border, const A* position) {
    int64_t start[d][2], step = 1;
#pragma unroll
    for (int i = d - 1; i >= 0; i--) {
      const int64_t size = grid.S[3 - d + i];
      const A low = border ? A(0) : A(-1), high = static_cast<A>(border ? size - 1 : size), p = position[i];
      const A clamped = p < low ? low : p > high ? high : p;
      const A base = p == p ? floor(clamped) : A(0), fraction = clamped - base;
      // a clamped position does not move; at the far border itself, clamping begins
      const bool moves = p >= low && (border ? p < high : p <= high);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int64_t at = static_cast<int64_t>(base) + e;
        const bool inside = at >= 0 && at < size;
        start[i][e] = (at < 0 ? 0 : inside ? at : size - 1) * step;
        part[i][e] = !inside && p == p ? A(0) : e ? fraction : A(1) - fraction;
        slope[i][e] = inside && moves ? A(2 * e - 1) : A(0);
      }
      step *= size;
    }
#pragma unroll
    for (int k = 0; k < kCorners; k++) {
      index[k] = 0, weight[k] = 1;
#pragma unroll
      for (int i = 0; i < d; i++) index[k] += start[i][bit(k, i)], weight[k] *= part[i][bit(k, i)];
    }
  }

  static __device__ __forceinline__ constexpr int bit(int corner, int axis) { return corner >> (d - 1 - axis) & 1; }

  // The value of a channel. -0.0 changes no sum, and a corner of weight 0 adds nothing, whatever its value: a position
  // on a voxel returns its very bits.
  template <class T>
  __device__ __forceinline__ A sample(const T* channel) const {
    A sum = A(-0.0);
#pragma unroll
    for (int k = 0; k < kCorners; k++)
      if (weight[k] != A(0)) sum += weight[k] * load(channel + index[k]);
    return sum;
  }

  // The backward of `sample` for one channel that starts at `first`, grad being that of its value: adds to the sums of
  // the image's gradient, and to products[k], the sum over channels of grad times corner k.
  template <class T, class Sums>
  __device__ __forceinline__ void sample_bwd(const T* image, int64_t first, A grad, const Sums& sums,
                                             A* products) const {
#pragma unroll
    for (int k = 0; k < kCorners; k++) {
      products[k] += grad * load(image + first + index[k]);
      if (weight[k] != A(0)) sums.add(first + index[k], weight[k] * grad);
    }
  }

  // The gradient with respect to the position along `axis`, from the products of all channels.
  __device__ __forceinline__ A position_gradient(const A* products, int axis) const {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < kCorners; k++) {
      A factor = 1;
#pragma unroll
      for (int i = 0; i < d; i++) factor *= (i == axis ? slope : part)[i][bit(k, i)];
      sum += factor * products[k];
    }
    return sum;
  }
};

}  // namespace cuda
}  // namespace cover
