// A box of an image with its channels last, so that one load brings a voxel in many channels at once.
//
// Sampling an image channel by channel takes 2^d loads for each output; with W channels in a vector it takes 2^d / W.
// A tile of outputs copies the box of the image that it reads into scratch, transposed, a block of W channels at a
// time. The box is then an image of its own: cells are found in it as in any other.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kBoxBytes = 512 << 10;  // of a box: half of a second-level cache of 1 MB

// Element J.. of a where J & S is 0, else element J - S.. of b; and what that leaves, in the same order.
template <int S, class V, size_t... J>
inline void exchange(V& a, V& b, std::index_sequence<J...>) {
  constexpr size_t W = sizeof...(J);
#if __has_builtin(__builtin_shufflevector)
  const V first = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
  b = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
#else
  const V first = {(J & S ? b[J - (J & S)] : a[J])...};
  b = V{(J & S ? b[J] : a[J + S & W - 1])...};
#endif
  a = first;
}

// A square of W x W elements, m[i][j] <-> m[j][i], by exchanging blocks of S, 2 S, .. elements.
template <class A, int W, int S = 1>
inline void transpose(Lanes<A, W>* m) {
  if constexpr (S < W) {
    for (int i = 0; i < W; i++)
      if (!(i & S)) exchange<S>(m[i], m[i + S], std::make_index_sequence<W>());
    transpose<A, W, 2 * S>(m);
  }
}

// dst[x][c] = src[c][x] for x < n and c < channels <= W; the other channels become 0.
template <int W, class T, class A>
inline void to_channels_last(const T* src, int64_t channel_stride, int64_t channels, int64_t n, A* dst) {
  using V = Lanes<A, W>;
  if (n < W) {
    for (int64_t x = 0; x < n; x++)
      for (int64_t c = 0; c < W; c++)
        dst[x * W + c] = c < channels ? static_cast<A>(src[c * channel_stride + x]) : A(0);
    return;
  }
  for (int64_t x0 = 0; x0 < n; x0 += W) {
    const int64_t x = min(x0, n - W);  // the last square overlaps the one before
    V m[W];
    for (int c = 0; c < W; c++) {
      A row[W] = {};
      if (c < channels)
        for (int i = 0; i < W; i++) row[i] = static_cast<A>(src[c * channel_stride + x + i]);
      std::memcpy(&m[c], row, sizeof(row));
    }
    transpose<A, W>(m);
    std::memcpy(dst + x * W, m, sizeof(m));
  }
}

// dst[c][x] = src[x][c] for x < n and c < channels <= W.
template <int W, class T, class A>
__attribute__((noinline)) void to_channels_first(const A* src, int64_t channel_stride, int64_t channels, int64_t n,
                                                 T* dst) {
  using V = Lanes<A, W>;
  if (n < W) {
    for (int64_t c = 0; c < channels; c++)
      for (int64_t x = 0; x < n; x++) dst[c * channel_stride + x] = static_cast<T>(src[x * W + c]);
    return;
  }
  for (int64_t x0 = 0; x0 < n; x0 += W) {
    const int64_t x = min(x0, n - W);
    V m[W];
    std::memcpy(m, src + x * W, sizeof(m));
    transpose<A, W>(m);
    for (int64_t c = 0; c < channels; c++) {
      A row[W];
      std::memcpy(row, &m[c], sizeof(row));
      for (int i = 0; i < W; i++) dst[c * channel_stride + x + i] = static_cast<T>(row[i]);
    }
  }
}

// A grid of voxels; a 2D one has S[0] = 1.
struct Grid {
  int64_t S[3];
  int64_t numel() const { return S[0] * S[1] * S[2]; }
};

// A part of a grid: `low` is its first voxel, `grid` its extent.
struct Box {
  int64_t low[3];
  Grid grid;
  int64_t numel() const { return grid.numel(); }
};

// The least and the largest of many positions; a NaN is neither.
template <class A>
struct Extent {
  Vec<A> least, most;  // of none: infinity and its negative

  void add(const A* p, int64_t n) {
    int64_t x = 0;
    for (; x + kLanes<A> <= n; x += kLanes<A>) add(load(p + x));
    for (; x < n; x++) add(splat(p[x]));
  }
  void add(Vec<A> p) {
    least = p < least ? p : least;
    most = p > most ? p : most;
  }
  A low() const {
    A low = least[0];
    for (int64_t i = 1; i < kLanes<A>; i++) low = min(low, least[i]);
    return low;
  }
  A high() const {
    A high = most[0];
    for (int64_t i = 1; i < kLanes<A>; i++) high = max(high, most[i]);
    return high;
  }
};

// The part of an image that is read for positions within `extent` [d].
template <class A>
inline Box box_around(const Grid& image, const Extent<A>* extent, int d) {
  Box box{{0, 0, 0}, {{1, 1, 1}}};
  for (int i = 3 - d; i < 3; i++) {
    const int64_t last = image.S[i] - 1;
    const auto voxel = [&](A p) { return static_cast<int64_t>(max(A(0), min(static_cast<A>(last), p))); };
    box.low[i] = min(voxel(extent[i - 3 + d].low()), max<int64_t>(0, last - 1));
    box.grid.S[i] = max(min(last, voxel(extent[i - 3 + d].high()) + 1), min(last, box.low[i] + 1)) - box.low[i] + 1;
  }
  return box;
}

// Copies channels [0, channels) of a box of image [.., *S] to dst [numel, W].
template <int W, class T, class A>
__attribute__((noinline)) void load_box(const T* image, const Grid& grid, const Box& box, int64_t channels, A* dst) {
  for (int64_t z = 0; z < box.grid.S[0]; z++)
    for (int64_t y = 0; y < box.grid.S[1]; y++) {
      const int64_t row = ((box.low[0] + z) * grid.S[1] + box.low[1] + y) * grid.S[2] + box.low[2];
      to_channels_last<W>(image + row, grid.numel(), channels, box.grid.S[2],
                          dst + (z * box.grid.S[1] + y) * box.grid.S[2] * W);
    }
}

}  // namespace COVER_ISA
}  // namespace cover
