// VEU on the CPU: lanes are neighbouring voxels along W, and key rows pass a tile of query rows.
//
// A tile is `rows` voxel rows by `width` voxels of one (batch, z). Every key row that some query of the tile sees is
// copied once into a zero-padded buffer with its halo (which also converts the storage type), a block of rows at a
// time, and used by all query rows within reach. At one vector of voxels, two query rows share each load of a key and
// keep the N scores along W in registers; the softmax is online in base 2, with scale * log2(e) folded into the
// queries. Only the sum and the innermost moment are accumulated per key: the outer moments are the row's sum times a
// constant. Nothing of size N^d exists anywhere. docs/performance.md counts what it costs.
namespace cover {
namespace COVER_ISA {

constexpr int kChunk = 8;  // scores of a row that are in registers at once; wider windows take several chunks
constexpr int kRows = COVER_REGISTERS >= 32 ? 2 : 1;  // query rows that share the loads of a key: what registers allow
constexpr int64_t kTileElements = 32768;              // of a tile's queries: half of a small second-level cache
constexpr int64_t kNearElements = 4096;  // of passing rows at one vector of voxels: half of a first-level cache
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The geometry of a VEU call: how it is cut into tiles.
template <class A>
struct VeuTiles {
  const Veu& a;
  int64_t D, H, W, R[3];  // R: the window's radii
  int64_t rows, width;    // of a tile; width is a multiple of the lanes
  int64_t left, halo;     // of a padded row: where the tile's first voxel is, and its width
  int64_t passing;        // padded rows that are in memory at once
  int64_t ny, nx, n;      // tiles along H, along W, and per (batch or group)

  explicit VeuTiles(const Veu& a) : a(a), D(a.S[0]), H(a.S[1]), W(a.S[2]) {
    // a window wider than the image sees no more than one as wide as the image
    for (int i = 0; i < 3; i++) R[i] = min((a.N[i] - 1) / 2, a.S[i] - 1);
    const int64_t lanes = kLanes<A>;
    rows = min<int64_t>(H, 8);
    while (rows > 1 && a.C * rows * lanes > kTileElements) rows /= 2;
    width = max(lanes, min(round_up(W, lanes), kTileElements / (a.C * rows) / lanes * lanes));
    left = round_up(R[2], lanes);
    halo = round_up(left + width + R[2], lanes);
    passing = max<int64_t>(1, min(min(rows + 2 * R[1], H), kNearElements / (2 * (a.C + 1) * lanes)));
    ny = (H + rows - 1) / rows;
    nx = (W + width - 1) / width;
    n = D * ny * nx;
  }
};

// One tile: its origin and its extent inside the image.
template <class A>
struct VeuTile {
  int64_t z, y, x, ny, nx;

  VeuTile(const VeuTiles<A>& t, int64_t tile)
      : z(tile / (t.ny * t.nx)),
        y(tile / t.nx % t.ny * t.rows),
        x(tile % t.nx * t.width),
        ny(min(t.rows, t.H - y)),
        nx(min(t.width, t.W - x)) {}
};

// Offset of voxel (z, y, x) of channel c, of `channels`, in batch b.
template <class A>
inline int64_t at(const VeuTiles<A>& t, int64_t b, int64_t channels, int64_t c, int64_t z, int64_t y, int64_t x) {
  return (((b * channels + c) * t.D + z) * t.H + y) * t.W + x;
}

// Queries (or keys) of a tile's rows in group j: dst [rows, C, width], zero beyond the image.
template <class A>
inline void load_tile(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t b, int64_t j, A factor,
                      A* dst) {
  const Veu& a = t.a;
  for (int64_t y = 0; y < tile.ny; y++)
    for (int64_t c = 0; c < a.C; c++, dst += t.width) {
      load_row(a.dtype, src, at(t, b, a.J * a.C, j * a.C + c, tile.z, tile.y + y, tile.x), tile.nx, factor, dst);
      fill(dst + tile.nx, t.width - tile.nx, A(0));
    }
}

// The part of a padded row that lies inside the image: dst[begin..end) holds voxels x0..
struct Inside {
  int64_t begin, end, x0;
};
template <class A>
inline Inside inside_row(const VeuTiles<A>& t, const VeuTile<A>& tile) {
  const int64_t x0 = max<int64_t>(0, tile.x - t.R[2]), x1 = min(t.W, tile.x + t.width + t.R[2]);
  return {t.left + x0 - tile.x, t.left + x1 - tile.x, x0};
}

// Fills a padded row outside the image.
template <class A>
inline void fill_outside(const VeuTiles<A>& t, const Inside& in, A value, A* dst) {
  fill(dst, in.begin, value);
  fill(dst + in.end, t.halo - in.end, value);
}

// One row of an acc tensor [.., *S] with its halo, `outside` beyond the image.
template <class A>
inline void load_halo(const VeuTiles<A>& t, const Inside& in, const void* src, int64_t row, A outside, A* dst) {
  fill_outside(t, in, outside, dst);
  std::memcpy(dst + in.begin, static_cast<const A*>(src) + row + in.x0, (in.end - in.begin) * sizeof(A));
}

// Feature row (z, y) of group j with its halo: dst [C, halo], zero beyond the image.
template <class A>
inline void load_features(const VeuTiles<A>& t, const Inside& in, const void* src, int64_t b, int64_t j, int64_t z,
                          int64_t y, A factor, A* dst) {
  const Veu& a = t.a;
  for (int64_t c = 0; c < a.C; c++, dst += t.halo) {
    fill_outside(t, in, A(0), dst);
    load_row(a.dtype, src, at(t, b, a.J * a.C, j * a.C + c, z, y, in.x0), in.end - in.begin, factor, dst + in.begin);
  }
}

// Key row with its halo: features [C, halo], then bias [halo]: 0 where a key takes part, -inf elsewhere. Keys that do
// not take part are zero, so that nothing they hold (a NaN, say) reaches the sums.
template <class A>
inline void load_keys(const VeuTiles<A>& t, const Inside& in, int64_t b, int64_t j, int64_t z, int64_t y, A* keys) {
  const Veu& a = t.a;
  load_features(t, in, a.k, b, j, z, y, A(1), keys);
  A* bias = keys + a.C * t.halo;
  fill_outside(t, in, -kInf<A>, bias);
  fill(bias + in.begin, in.end - in.begin, A(0));
  if (!a.mask) return;
  const bool* mask = a.mask + at(t, b, 1, 0, z, y, in.x0);
  for (int64_t i = in.begin; i < in.end; i++) {
    if (mask[i - in.begin]) continue;
    bias[i] = -kInf<A>;
    for (int64_t c = 0; c < a.C; c++) keys[c * t.halo + i] = 0;
  }
}

// Dot products of R rows of a tile with G neighbours of a passing row: s[r][g] += sum_c q[r][c] * k[c][. + g]
template <int R, int G, class V, class A>
COVER_INLINE void dot(int64_t C, const A* q, int64_t q_row, int64_t q_stride, const A* k, int64_t k_stride, V (*s)[G]) {
  for (int64_t c = 0; c < C; c++) {
    V query[R];
    unroll<R>([&](auto r) COVER_INLINE_LAMBDA { query[r] = load_once<V>(q + r * q_row + c * q_stride); });
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const V key = R == 1 ? load_as<V>(k + c * k_stride + g) : load_once<V>(k + c * k_stride + g);
      unroll<R>([&](auto r) COVER_INLINE_LAMBDA { s[r][g] += query[r] * key; });
    });
  }
}

// Calls f(first offset, their number as a constant) for the chunks of a row of n offsets, n odd.
template <class F>
inline void for_chunks(int64_t n, const F& f) {
  int64_t o = 0;
  for (; n - o >= kChunk; o += kChunk) f(o, std::integral_constant<int, kChunk>());
  switch (n - o) {
    case 1: return f(o, std::integral_constant<int, 1>());
    case 3: return f(o, std::integral_constant<int, 3>());
    case 5: return f(o, std::integral_constant<int, 5>());
    case 7: return f(o, std::integral_constant<int, 7>());
  }
}

// Calls f(x, a vector to tell its type) for the vectors of a row of n voxels. Where half a vector is enough for the
// last of them it is one: processors that work on 64 bytes in two turns save one.
template <class A, class F>
inline void for_vectors(int64_t n, const F& f) {
  constexpr int64_t lanes = kLanes<A>, last = COVER_BYTES == 64 ? lanes / 2 : lanes;
  int64_t x = 0;
  for (; n - x > (last < lanes ? last : 0); x += lanes) f(x, Vec<A>());
  if (n > x) f(x, Lanes<A, last>());
}

// Calls f(z, y, n) for blocks of n rows (z, y..) that pass a tile: all that its windows see.
template <class A, class F>
inline void for_passing_rows(const VeuTiles<A>& t, const VeuTile<A>& tile, const F& f) {
  const int64_t y0 = max<int64_t>(0, tile.y - t.R[1]), y1 = min(t.H, tile.y + tile.ny + t.R[1]);
  for (int64_t z = max<int64_t>(0, tile.z - t.R[0]); z <= min(t.D - 1, tile.z + t.R[0]); z++)
    for (int64_t y = y0; y < y1; y += t.passing) f(z, y, min(t.passing, y1 - y));
}

// Rows first..last - 1 of a block that passes a tile.
struct Reach {
  int64_t first, last;
};

// For each kRows neighbouring rows of a tile, calls f(the first of them, what each sees of the block of n rows y..,
// how far it is from the block's first row).
template <class A, class F>
inline void for_row_pairs(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t y, int64_t n, const F& f) {
  for (int64_t row = 0; row < tile.ny; row += kRows) {
    Reach seen[kRows];
    int64_t oy[kRows];
    for (int r = 0; r < kRows; r++) {
      oy[r] = y - (tile.y + row + r);
      seen[r] = {min(n, max<int64_t>(0, -t.R[1] - oy[r])), max<int64_t>(0, min(n, t.R[1] + 1 - oy[r]))};
      if (row + r >= tile.ny) seen[r] = {n, n};
    }
    f(row, seen, oy);
  }
}

// Calls f(how many rows of the pair, the first of them, passing row), numbers of rows as constants, for each passing
// row that one or both of two neighbouring rows see.
template <class F>
COVER_INLINE void for_passing(const Reach (&seen)[kRows], const F& f) {
  using One = std::integral_constant<int, 1>;
  using Zero = std::integral_constant<int, 0>;
  if constexpr (kRows == 1) {
    for (int64_t i = seen[0].first; i < seen[0].last; i++) f(One(), Zero(), i);
  } else {
    for (int64_t i = seen[0].first; i < min(seen[0].last, seen[1].first); i++) f(One(), Zero(), i);
    for (int64_t i = seen[1].first; i < seen[0].last; i++) f(std::integral_constant<int, 2>(), Zero(), i);
    for (int64_t i = max(seen[0].last, seen[1].first); i < seen[1].last; i++) f(One(), One(), i);
  }
}

// Online softmax of a tile's rows: maximum, sum and moments along the three axes, each [rows, width].
template <class A>
struct Softmax {
  A *max, *sum, *moment[3];
};

// The key rows of a plane, at oz, against kRows query rows, oy[r] + i away from key row i: G offsets, of which the
// middle one is `middle`. q, keys and state point at the vector of voxels and the first offset.
template <int G, class V, class A>
__attribute__((noinline)) void forward_plane(const VeuTiles<A>& t, const A* q, const A* keys,
                                             const Reach (&seen)[kRows], A oz, const int64_t (&oy)[kRows], A middle,
                                             const Softmax<A>& state) {
  const int64_t C = t.a.C;
  V top[kRows], sum[kRows], along_y[kRows], along_x[kRows];
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    top[r] = load_as<V>(state.max + r * t.width);
    sum[r] = along_y[r] = along_x[r] = V{};
  });
  for_passing(seen, [&](auto rows, auto first, int64_t i) COVER_INLINE_LAMBDA {
    const A* row = keys + i * (C + 1) * t.halo;
    V s[rows][G];
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const V bias = load_as<V>(row + C * t.halo + g);
      unroll<rows>([&](auto j) COVER_INLINE_LAMBDA { s[j][g] = bias; });
    });
    dot<rows, G>(C, q + first * C * t.width, C * t.width, t.width, row, t.halo, s);
    unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
      const int r = first + j;
      V now = top[r];
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA { now = larger(s[j][g], now); });
      const V decay = exp2(top[r] - now);
      top[r] = now;
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA { s[j][g] = exp2(s[j][g] - now); });
      // opposite offsets together: the moment about the middle takes one multiplication for two of them
      V total{}, moment{};
      if (G % 2) total = s[j][G / 2];
      unroll<G / 2>([&](auto g) COVER_INLINE_LAMBDA {
        total += s[j][g] + s[j][G - 1 - g];
        moment += (s[j][G - 1 - g] - s[j][g]) * static_cast<A>((G - 1) / 2.0 - g);
      });
      sum[r] = sum[r] * decay + total;
      along_x[r] = along_x[r] * decay + moment;
      along_y[r] = along_y[r] * decay + total * static_cast<A>(oy[r] + i);
    });
  });
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    if (seen[r].first >= seen[r].last) return;
    const int64_t at = r * t.width;
    const V decay = exp2(load_as<V>(state.max + at) - top[r]);
    const auto add = [&](A* to, V value) { store(to + at, load_as<V>(to + at) * decay + value); };
    store(state.max + at, top[r]);
    add(state.sum, sum[r]);
    add(state.moment[2], along_x[r] + sum[r] * middle);
    add(state.moment[1], along_y[r]);
    add(state.moment[0], sum[r] * oz);
  });
}

template <class A>
struct ForwardBuffers {
  A *q, *keys, *state, *out;

  static int64_t size(const VeuTiles<A>& t) {
    return t.rows * t.a.C * t.width + t.passing * (t.a.C + 1) * t.halo + 8 * t.rows * t.width;
  }
  ForwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : q(scratch.take(t.rows * t.a.C * t.width)),
        keys(scratch.take(t.passing * (t.a.C + 1) * t.halo)),
        state(scratch.take(5 * t.rows * t.width)),
        out(scratch.take(3 * t.rows * t.width)) {}
};

// v and lse of one tile; `out` [3, rows, width] sums the groups.
template <class A>
inline void forward_tile(const VeuTiles<A>& t, int64_t b, const VeuTile<A>& tile, const ForwardBuffers<A>& s) {
  const Veu& a = t.a;
  const int64_t plane = t.rows * t.width;
  const Inside in = inside_row(t, tile);
  fill(s.out, 3 * plane, A(0));
  for (int64_t j = 0; j < a.J; j++) {
    load_tile(t, tile, a.q, b, j, static_cast<A>(a.scale * kLog2e), s.q);
    // finite, so that -inf - max is never NaN
    fill(s.state, plane, std::numeric_limits<A>::lowest() / 2);
    fill(s.state + plane, 4 * plane, A(0));
    const auto state_at = [&](int64_t i) {
      A* p = s.state + i;
      return Softmax<A>{p, p + plane, {p + 2 * plane, p + 3 * plane, p + 4 * plane}};
    };
    for_passing_rows(t, tile, [&](int64_t z, int64_t y, int64_t n) {
      for (int64_t i = 0; i < n; i++) load_keys(t, in, b, j, z, y + i, s.keys + i * (a.C + 1) * t.halo);
      for_vectors<A>(tile.nx, [&](int64_t x, auto vector) {
        for_row_pairs(t, tile, y, n, [&](int64_t row, const Reach(&seen)[kRows], const int64_t(&oy)[kRows]) {
          for_chunks(2 * t.R[2] + 1, [&](int64_t o, auto G) {
            forward_plane<G, decltype(vector)>(t, s.q + row * a.C * t.width + x, s.keys + t.left - t.R[2] + x + o, seen,
                                               static_cast<A>(z - tile.z), oy,
                                               static_cast<A>(o - t.R[2] + (G - 1) / 2.0), state_at(row * t.width + x));
          });
        });
      });
    });
    for (int64_t y = 0; y < tile.ny; y++) {
      const Softmax<A> m = state_at(y * t.width);
      for (int64_t x = 0; x < t.width; x += kLanes<A>) {
        const Vec<A> sum = load(m.sum + x);
        // 1 where there is no key: the moments are 0 there
        const Vec<A> weight = static_cast<A>(1.0 / a.J) / (sum == A(0) ? splat(A(1)) : sum);
        for (int i = 0; i < 3; i++) {
          A* out = s.out + i * plane + y * t.width + x;
          store(out, load(out) + load(m.moment[i] + x) * weight);
        }
        const Vec<A> lse = (load(m.max + x) + log2(sum == A(0) ? splat(A(1)) : sum)) * static_cast<A>(kLn2);
        store(m.max + x, sum == A(0) ? splat(-kInf<A>) : lse);
      }
      std::memcpy(static_cast<A*>(a.lse) + at(t, b, a.J, j, tile.z, tile.y + y, tile.x), m.max, tile.nx * sizeof(A));
    }
  }
  for (int64_t i = 0; i < a.d; i++)
    for (int64_t y = 0; y < tile.ny; y++)
      std::memcpy(static_cast<A*>(a.v) + at(t, b, a.d, i, tile.z, tile.y + y, tile.x),
                  s.out + (3 - a.d + i) * plane + y * t.width, tile.nx * sizeof(A));
}

template <class A>
inline void veu_fwd(const Veu& a) {
  const VeuTiles<A> t(a);
  parallel_for(a.B * t.n, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(ForwardBuffers<A>::size(t));
    const ForwardBuffers<A> buffers(t, scratch);
    for (int64_t i = begin; i < end; i++) forward_tile(t, i / t.n, VeuTile<A>(t, i % t.n), buffers);
  });
}

}  // namespace COVER_ISA
}  // namespace cover
