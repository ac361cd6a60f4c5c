// A box of an image with its channels last, so that one load brings a voxel in W channels at once.
//
// Sampling an image channel by channel takes 2^d loads for each output; with W channels in a vector it takes 2^d / W.
namespace cover {
namespace COVER_ISA {

// Channels that are worked on together: 32 bytes of them. Two loads of 32 bytes start in a cycle or one of 64, and a
// box of 64 bytes to a voxel would hold half the voxels: more of them would be copied by several tiles.
template <class A>
constexpr int64_t kWidth = (COVER_BYTES < 32 ? COVER_BYTES : 32) / sizeof(A);

// kWidth channels of a voxel.
template <class A>
using Channels = Lanes<A, kWidth<A>>;

// Elements E of two vectors side by side.
template <class V, size_t... E>
COVER_INLINE V pick(V a, V b, std::index_sequence<E...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, E...);
#else
  constexpr size_t W = sizeof...(E);
  return V{(E < W ? a[E % W] : b[E % W])...};
#endif
}

// Element J.. of a where J & S is 0, else element J - S.. of b; and what that leaves, in the same order.
template <int S, class V, size_t... J>
COVER_INLINE void exchange(V& a, V& b, std::index_sequence<J...>) {
  constexpr size_t W = sizeof...(J);
  const V first = pick(a, b, std::index_sequence<(J & S ? W + J - S : J)...>());
  b = pick(a, b, std::index_sequence<(J & S ? W + J : J + S)...>());
  a = first;
}

// A square of W x W elements, m[i][j] <-> m[j][i], by exchanging blocks of S, 2 S, .. elements; with less than W rows
// as many such squares, side by side.
template <class A, int64_t rows = kWidth<A>, int S = 1>
COVER_INLINE void transpose(Channels<A>* m) {
  if constexpr (S < rows) {
    for (int i = 0; i < rows; i++)
      if (!(i & S)) exchange<S>(m[i], m[i + S], std::make_index_sequence<kWidth<A>>());
    transpose<A, rows, 2 * S>(m);
  }
}

// kWidth elements in a storage type, and back.
template <class A, class T>
COVER_INLINE Channels<A> load_lanes(const T* p) {
  Channels<A> v;
  if constexpr (std::is_same_v<A, T>)
    std::memcpy(&v, p, sizeof(v));
  else
    for (int i = 0; i < kWidth<A>; i++) v[i] = static_cast<A>(p[i]);
  return v;
}
template <class A, class T>
COVER_INLINE void store_lanes(T* p, Channels<A> v) {
  if constexpr (std::is_same_v<A, T>)
    std::memcpy(p, &v, sizeof(v));
  else
    for (int i = 0; i < kWidth<A>; i++) p[i] = static_cast<T>(v[i]);
}

// p[0] and p[1] of half of kWidth voxels with the indices `first`: of every second P of them from the k-th P on, so
// that two such vectors have the same voxels in the same 16 bytes.
template <class A, size_t k, class I, size_t... N>
COVER_INLINE Channels<A> load_half(const A* p, const I* first, std::index_sequence<N...>) {
  constexpr size_t P = 8 / sizeof(A);
  if constexpr (P == 2)
    return (Channels<A>)Lanes<double, sizeof...(N)>{load_as<double>(p + first[N / P * 2 * P + k * P + N % P])...};
  Channels<A> v{};
  ((v[2 * N] = p[first[2 * N + k]], v[2 * N + 1] = p[first[2 * N + k] + 1]), ...);
  return v;
}

// side[i][j] = p[first[j] + i * next] for kWidth voxels j. Where `next` is the constant 1, one load brings both sides.
template <class A, class T, class I, class Next, size_t... J>
COVER_INLINE void load_pairs(const T* p, const I* first, Next next, Channels<A>* side, std::index_sequence<J...>) {
  constexpr size_t W = sizeof...(J), P = 8 / sizeof(A);
  constexpr bool kBeside = std::is_same_v<Next, std::integral_constant<int, 1>>;
  if constexpr (kBeside && std::is_same_v<T, A>) {
    const Channels<A> a = load_half<A, 0>(p, first, std::make_index_sequence<W / 2>());
    const Channels<A> b = load_half<A, 1>(p, first, std::make_index_sequence<W / 2>());
    side[0] = pick(a, b, std::index_sequence<(J / P % 2 * W + J / (2 * P) * 2 * P + J % P * 2)...>());
    side[1] = pick(a, b, std::index_sequence<(J / P % 2 * W + J / (2 * P) * 2 * P + J % P * 2 + 1)...>());
  } else if constexpr (kBeside && std::is_same_v<T, BFloat16>) {
    const Lanes<int32_t, W> both = {load_as<int32_t>(p + first[J])...};
    side[0] = (Channels<A>)(both << 16), side[1] = (Channels<A>)(both & ~0xffff);
  } else {
    side[0] = Channels<A>{static_cast<A>(p[first[J]])...};
    side[1] = Channels<A>{static_cast<A>(p[first[J] + next])...};
  }
}

// Calls f(x, channels) for squares of kWidth voxels from x on, of a row of n >= kWidth; the last one may overlap the
// one before. The number of channels is a constant where there are kWidth.
template <class A, class F>
COVER_INLINE void for_squares(int64_t n, int64_t channels, const F& f) {
  constexpr int64_t W = kWidth<A>;
  for (int64_t x = 0; x < n; x += W)
    channels == W ? f(min(x, n - W), std::integral_constant<int64_t, W>()) : f(min(x, n - W), channels);
}

// dst[x][c] = src[c][x] for x < n and c < channels <= kWidth; the other channels become 0.
template <class A, class T>
__attribute__((noinline)) void to_channels_last(const T* src, int64_t stride, int64_t channels, int64_t n,
                                                Channels<A>* dst) {
  constexpr int64_t W = kWidth<A>;
  if (n < W) {
    for (int64_t x = 0; x < n; x++)
      for (int64_t c = 0; c < W; c++) dst[x][c] = c < channels ? static_cast<A>(src[c * stride + x]) : A(0);
    return;
  }
  for_squares<A>(n, channels, [&](int64_t x, auto channels) COVER_INLINE_LAMBDA {
    Channels<A> m[W];
    for (int64_t c = 0; c < W; c++) m[c] = c < channels ? load_lanes<A>(src + c * stride + x) : Channels<A>{};
    transpose<A>(m);
    for (int64_t i = 0; i < W; i++) dst[x + i] = m[i];
  });
}

// dst[c][x] = src[x][c] for x < n and c < channels <= kWidth.
template <class A, class T>
__attribute__((noinline)) void to_channels_first(const Channels<A>* src, int64_t stride, int64_t channels, int64_t n,
                                                 T* dst) {
  constexpr int64_t W = kWidth<A>;
  if (n < W) {
    for (int64_t c = 0; c < channels; c++)
      for (int64_t x = 0; x < n; x++) dst[c * stride + x] = static_cast<T>(src[x][c]);
    return;
  }
  for_squares<A>(n, channels, [&](int64_t x, auto channels) COVER_INLINE_LAMBDA {
    Channels<A> m[W];
    for (int64_t i = 0; i < W; i++) m[i] = src[x + i];
    transpose<A>(m);
    for (int64_t c = 0; c < W; c++)
      if (c < channels) store_lanes<A>(dst + c * stride + x, m[c]);
  });
}

// dst[c][x] += src[x][c] for x < n and c < channels <= kWidth.
template <class A>
__attribute__((noinline)) void add_channels_first(const Channels<A>* src, int64_t stride, int64_t channels, int64_t n,
                                                  A* dst) {
  constexpr int64_t W = kWidth<A>;
  const int64_t whole = n / W * W;
  for_squares<A>(whole, channels, [&](int64_t x, auto channels) COVER_INLINE_LAMBDA {
    Channels<A> m[W];
    for (int64_t i = 0; i < W; i++) m[i] = src[x + i];
    transpose<A>(m);
    for (int64_t c = 0; c < W; c++)
      if (c < channels) store_lanes<A>(dst + c * stride + x, load_lanes<A>(dst + c * stride + x) + m[c]);
  });
  for (int64_t x = whole; x < n; x++)
    for (int64_t c = 0; c < channels; c++) dst[c * stride + x] += src[x][c];
}

// out[x] += the sum over channels of src[x] for x < W.
template <class A>
COVER_INLINE void add_channels(Channels<A>* src, A* out) {
  transpose<A>(src);
  Channels<A> sum = load_lanes<A>(out);
  for (int c = 0; c < kWidth<A>; c++) sum += src[c];
  store_lanes<A>(out, sum);
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

// The part of an image that is read for positions within `extent` [d], its rows whole squares where the image is wide
// enough.
template <class A>
inline Box box_around(const Grid& image, const Extent<A>* extent, int d) {
  Box box{{0, 0, 0}, {{1, 1, 1}}};
  for (int i = 3 - d; i < 3; i++) {
    const int64_t last = image.S[i] - 1;
    const auto voxel = [&](A p) { return static_cast<int64_t>(max(A(0), min(static_cast<A>(last), p))); };
    box.low[i] = min(voxel(extent[i - 3 + d].low()), max<int64_t>(0, last - 1));
    box.grid.S[i] = max(min(last, voxel(extent[i - 3 + d].high()) + 1), min(last, box.low[i] + 1)) - box.low[i] + 1;
  }
  box.grid.S[2] = min(image.S[2], round_up(box.grid.S[2], kWidth<A>));
  box.low[2] = min(box.low[2], image.S[2] - box.grid.S[2]);
  return box;
}

}  // namespace COVER_ISA
}  // namespace cover
