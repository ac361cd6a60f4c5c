// Linear interpolation of segments of voxels along W: the part that warp and compose, forward and backward, share.
//
// Positions are turned once into cells (the 2^d corners' indices and weights), and all channels are then read, or
// added to, through the same cells.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kSegment = 64;  // voxels that are worked on together

// The grid that is coarser by a stride.
inline Grid coarser(const Grid& g, const int64_t* stride) {
  return {{g.S[0] / stride[0], g.S[1] / stride[1], g.S[2] / stride[2]}};
}

// Keeps the compiler from vectorising a loop: scalar loads beat gather instructions here on the processors measured.
#define COVER_SCALAR_LOOP __asm__ volatile("")

// Cells of n <= kSegment positions. A cell has 2^(d-1) rows along W of two neighbouring voxels each, so that one load
// brings both. Row k takes bit i of k along axis i of the d - 1 outer axes, the last of them lowest.
template <class A, class I, int d>
struct Cells {
  static constexpr int kRows = 1 << (d - 1);
  static constexpr int kTogether = 4;  // channels that share one load of a cell
  typedef A Pair __attribute__((vector_size(2 * sizeof(A))));
  I index[kRows][kSegment];      // of a row's first voxel, in one channel of the image
  Pair weight[kRows][kSegment];  // 0 outside the image
  I partial[kSegment];           // not 0 where some weight is 0
  A part[d][2][kSegment];        // factors of the weight along each axis
  A slope[d][2][kSegment];       // their derivatives
  I next;                        // distance of a row's second voxel: 1, or 0 in an image one voxel wide

  // position [d][kSegment], in voxels of `grid`. With `border` it is clamped into the image, else corners outside
  // weigh 0. A NaN position gets NaN weights.
  void find(const Grid& grid, bool border, const A (*position)[kSegment], int64_t n) {
    constexpr int64_t lanes = kLanes<A>;
    typedef I Index __attribute__((vector_size(lanes * sizeof(I))));
    using Mask = decltype(Vec<A>{} < Vec<A>{});
    I first[d][kSegment], step[d];
    for (int64_t i = d - 1, stride = 1; i >= 0; i--) {
      const I size = static_cast<I>(grid.S[3 - d + i]);
      const A low = border ? A(0) : A(-1), high = border ? A(size - 1) : A(size);
      const I base_last = max<I>(0, size - 2);
      step[i] = size > 1 ? static_cast<I>(stride) : 0;
      for (int64_t x = 0; x < n; x += lanes) {
        const Vec<A> p = load(position[i] + x);
        const Vec<A> clamped = p < low ? splat(low) : p > high ? splat(high) : p;
        const Vec<A> valid = clamped == clamped ? clamped : splat(A(0));
        Index floor = __builtin_convertvector(valid, Index);
        floor += __builtin_convertvector(__builtin_convertvector(floor, Vec<A>) > valid, Index);
        const Vec<A> fraction = clamped - __builtin_convertvector(floor, Vec<A>), rest = A(1) - fraction;
        const Index base = floor < 0 ? Index{} : floor > base_last ? Index{} + base_last : floor;
        // the cell's floor is the first voxel of the pair, the second (past the last pair), or before the image
        const Mask usual = __builtin_convertvector(floor == base, Mask);
        const Mask before = __builtin_convertvector(floor < base, Mask);
        const Mask past = __builtin_convertvector((floor == base + 1) & (floor < size), Mask);
        const Vec<A> zero{}, one = splat(A(1)), beyond = size > 1 ? one : zero;
        store(part[i][0] + x, usual ? rest : before ? fraction : zero);
        store(part[i][1] + x, usual ? fraction * beyond : past ? rest : zero);
        const Vec<A> moves = (p >= low) & (border ? p < high : p <= high) ? one : zero;
        store(slope[i][0] + x, usual ? -moves : before ? moves : zero);
        store(slope[i][1] + x, usual ? moves * beyond : past ? -moves : zero);
        const Index start = base * static_cast<I>(stride);
        std::memcpy(first[i] + x, &start, sizeof(start));
      }
      stride *= size;
    }
    next = step[d - 1];
    for (int64_t x = 0; x < n; x += lanes) {
      Index some_zero{};
      for (int k = 0; k < kRows; k++) {
        Index at;
        std::memcpy(&at, first[d - 1] + x, sizeof(at));
        Vec<A> w = splat(A(1));
        for (int i = 0; i < d - 1; i++) {
          Index outer;
          std::memcpy(&outer, first[i] + x, sizeof(outer));
          at += outer + bit(k, i) * step[i];
          w *= load(part[i][bit(k, i)] + x);
        }
        const Vec<A> left = w * load(part[d - 1][0] + x), right = w * load(part[d - 1][1] + x);
        std::memcpy(index[k] + x, &at, sizeof(at));
        store_pairs(reinterpret_cast<A*>(weight[k] + x), left, right);
        some_zero |= __builtin_convertvector((left == A(0)) | (right == A(0)), Index);
      }
      std::memcpy(partial + x, &some_zero, sizeof(some_zero));
    }
  }

  static constexpr int bit(int k, int i) { return k >> (d - 2 - i) & 1; }

  template <class T>
  Pair load_pair(const T* p) const {
    return Pair{static_cast<A>(p[0]), static_cast<A>(p[next])};
  }
  Pair load_pair(const A* p) const {
    if (next == 0) return Pair{p[0], p[0]};
    Pair pair;
    std::memcpy(&pair, p, sizeof(pair));
    return pair;
  }

  // Calls f(voxel, first channel, number of channels as a constant): a few channels through each cell in turn.
  template <class F>
  static void for_cells(int64_t C, int64_t n, const F& f) {
    int64_t c = 0;
    for (; c + kTogether <= C; c += kTogether)
      for (int64_t x = 0; x < n; x++) f(x, c, std::integral_constant<int, kTogether>());
    for (; c < C; c++)
      for (int64_t x = 0; x < n; x++) f(x, c, std::integral_constant<int, 1>());
  }

  // write(c, x, value) for each channel of image [C, numel] at the cells.
  template <class T, class Write>
  void gather(const T* image, int64_t C, int64_t numel, int64_t n, const Write& write) const {
    for_cells(C, n, [&](int64_t x, int64_t c, auto channels) {
      Pair w[kRows];
      const T* row[kRows];
      for (int k = 0; k < kRows; k++) w[k] = weight[k][x], row[k] = image + c * numel + index[k][x];
      for (int i = 0; i < channels; i++) {
        COVER_SCALAR_LOOP;
        if (partial[x]) {
          // -0.0 changes no sum, and a corner of weight 0 adds nothing: a cell on a voxel returns its very bits
          A sum = A(-0.0);
          for (int k = 0; k < kRows; k++) {
            const Pair pair = load_pair(row[k] + i * numel);
            for (int e = 0; e < 2; e++)
              if (w[k][e] != A(0)) sum += w[k][e] * pair[e];
          }
          write(c + i, x, sum);
        } else {
          Pair sum{};
          for (int k = 0; k < kRows; k++) sum += w[k] * load_pair(row[k] + i * numel);
          write(c + i, x, sum[0] + sum[1]);
        }
      }
    });
  }

  // Channels of a box [numel, W] at the cells: out [n, W].
  template <int W>
  void gather_lanes(const A* box, int64_t n, A* out) const {
    using V = Lanes<A, W>;
    for (int64_t x = 0; x < n; x++) {
      V sum = -V{};  // -0.0, as in `gather`
      const auto add = [&](int k, int e) {
        V voxel;
        std::memcpy(&voxel, box + (index[k][x] + e * next) * W, sizeof(voxel));
        sum += weight[k][x][e] * voxel;
      };
      if (partial[x]) {
        for (int k = 0; k < kRows; k++)
          for (int e = 0; e < 2; e++)
            if (weight[k][x][e] != A(0)) add(k, e);
      } else {
        for (int k = 0; k < kRows; k++) add(k, 0), add(k, 1);
      }
      std::memcpy(out + x * W, &sum, sizeof(sum));
    }
  }

  // image [C, numel] += read(c, x) at the cells: the transpose of `gather`, voxel after voxel. Not in pairs: the next
  // voxel's pair overlaps this one's, and a load that straddles two stores would wait for both to reach the cache.
  template <class Read>
  void scatter(A* image, int64_t C, int64_t numel, int64_t n, const Read& read) const {
    for_cells(C, n, [&](int64_t x, int64_t c, auto channels) {
      for (int i = 0; i < channels; i++) {
        COVER_SCALAR_LOOP;
        const A g = read(c + i, x);
        for (int k = 0; k < kRows; k++) {
          A* row = image + (c + i) * numel + index[k][x];
          row[0] += weight[k][x][0] * g;
          row[next] += weight[k][x][1] * g;
        }
      }
    });
  }

  // products[x][k] = sum over channels of read(c, x) * image[c] at row k.
  template <class T, class Read>
  void corner_products(const T* image, int64_t C, int64_t numel, int64_t n, Pair (*products)[kRows],
                       const Read& read) const {
    for (int64_t x = 0; x < n; x++)
      for (int k = 0; k < kRows; k++) products[x][k] = Pair{};
    for_cells(C, n, [&](int64_t x, int64_t c, auto channels) {
      Pair sum[kRows];
      const T* row[kRows];
      for (int k = 0; k < kRows; k++) sum[k] = products[x][k], row[k] = image + c * numel + index[k][x];
      for (int i = 0; i < channels; i++) {
        COVER_SCALAR_LOOP;
        const A g = read(c + i, x);
        for (int k = 0; k < kRows; k++) sum[k] += load_pair(row[k] + i * numel) * g;
      }
      for (int k = 0; k < kRows; k++) products[x][k] = sum[k];
    });
  }

  // The gradient with respect to the position along `axis`, from the products of all channels.
  void position_gradient(const Pair (*products)[kRows], int axis, int64_t n, A* grad) const {
    for (int64_t x = 0; x < n; x++) {
      A sum = 0;
      for (int k = 0; k < kRows; k++)
        for (int e = 0; e < 2; e++) {
          A factor = 1;
          for (int i = 0; i < d; i++) factor *= (i == axis ? slope : part)[i][i < d - 1 ? bit(k, i) : e][x];
          sum += factor * products[x][k][e];
        }
      grad[x] = sum;
    }
  }
};

// Where a position of a level lies on the level that is coarser by `stride`.
template <class A>
inline A coarse_position(A p, int64_t stride) {
  return stride == 1 ? p : (p + A(0.5)) / static_cast<A>(stride) - A(0.5);
}

// Neighbours and fraction of a voxel's position on a coarser level, along one axis, clamped at the border.
template <class A>
struct Between {
  int64_t i0, i1;
  A fraction;
  Between(int64_t p, int64_t stride, int64_t size) {
    A c = coarse_position(static_cast<A>(p), stride);
    c = max(A(0), min(static_cast<A>(size - 1), c));
    i0 = static_cast<int64_t>(c);
    i1 = min(i0 + 1, size - 1);
    fraction = c - static_cast<A>(i0);
  }
};

// One row of a segment of the fine level: voxels x0 .. x0 + n of line (z, y).
struct Segment {
  int64_t z, y, x0, n;
};

// Calls f(segment) for the voxels of lines [first, last) along the outermost axis (D, or H in 2D).
template <int d, class F>
inline void for_segments(const Grid& g, int64_t first, int64_t last, const F& f) {
  const int64_t z0 = d == 3 ? first : 0, z1 = d == 3 ? last : 1;
  const int64_t y0 = d == 3 ? 0 : first, y1 = d == 3 ? g.S[1] : last;
  for (int64_t z = z0; z < z1; z++)
    for (int64_t y = y0; y < y1; y++)
      for (int64_t x = 0; x < g.S[2]; x += kSegment) f(Segment{z, y, x, min(kSegment, g.S[2] - x)});
}

// All segments of a batch of B grids, on all threads: f(b, segment, thread's state), `make()` making the state.
template <int d, class Make, class F>
inline void parallel_segments(int64_t B, const Grid& g, const Make& make, const F& f) {
  const int64_t outer = g.S[3 - d];
  parallel_for(B * outer, [&](int64_t begin, int64_t end) {
    auto state = make();
    for (int64_t i = begin; i < end; i++)
      for_segments<d>(g, i % outer, i % outer + 1, [&](const Segment& s) { f(i / outer, s, *state); });
  });
}

// Calls f with the spatial dimension, and with the narrowest index type that addresses a channel.
template <class F>
inline void with_geometry(int64_t d, int64_t numel, const F& f) {
  const bool narrow = numel < std::numeric_limits<int32_t>::max();
  if (d == 2)
    narrow ? f(std::integral_constant<int, 2>(), int32_t()) : f(std::integral_constant<int, 2>(), int64_t());
  else
    narrow ? f(std::integral_constant<int, 3>(), int32_t()) : f(std::integral_constant<int, 3>(), int64_t());
}

}  // namespace COVER_ISA
}  // namespace cover
