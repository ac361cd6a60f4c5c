// VEU on the CPU: lanes are neighbouring voxels along W, and key rows pass a tile of query rows.
//
// A tile is `planes` by `rows` voxel rows of `width` voxels. Every key row that some query of the tile sees is copied
// once into a zero-padded buffer with its halo (which also converts the storage type), a block of rows at a time, and
// used by all query rows within reach. At one vector of voxels, two query rows share each load of a key and keep the N
// scores along W in registers; the softmax is online in base 2, with scale * log2(e) folded into the queries. Only the
// sum and the innermost moment are accumulated per key: the outer moments are the row's sum times a constant. Nothing
// of size N^d exists anywhere. docs/performance.md counts what it costs.
namespace cover {
namespace COVER_ISA {

constexpr int kChunk = 8;  // scores of a row that are in registers at once; wider windows take several chunks
constexpr int kRows = COVER_REGISTERS >= 32 ? 2 : 1;  // query rows that share the loads of a key: what registers allow
constexpr int64_t kTileElements = 32768;              // of a tile's queries: half of a small second-level cache
constexpr int64_t kNearElements = 4096;  // of passing rows at one vector of voxels: half of a first-level cache
constexpr int64_t kTilePlanes = 4;       // of a tile at most,
constexpr int64_t kFewTiles = 8;         // and fewer rather than leave fewer tiles than this to the threads
constexpr double kSlack = 64;            // by as much scores may exceed what stands for their maximum, in powers of 2
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The geometry of a VEU call: how it is cut into tiles.
template <class A>
struct VeuTiles {
  const Veu& a;
  int64_t D, H, W, R[3];        // R: the window's radii
  int64_t planes, rows, width;  // of a tile; width is a multiple of the lanes
  int64_t left, halo;           // of a padded row: where the tile's first voxel is, and its width
  int64_t passing;              // padded rows that are in memory at once
  int64_t nz, ny, nx, n;        // tiles along D, H and W, and per (batch or group)

  explicit VeuTiles(const Veu& a) : a(a), D(a.S[0]), H(a.S[1]), W(a.S[2]) {
    // a window wider than the image sees no more than one as wide as the image
    for (int i = 0; i < 3; i++) R[i] = min((a.N[i] - 1) / 2, a.S[i] - 1);
    const int64_t lanes = kLanes<A>;
    int64_t most = 8;
    while (most > 1 && a.C * most * lanes > kTileElements) most /= 2;
    split(H, most, rows, ny, kRows);
    width = max(lanes, min(round_up(W, lanes), kTileElements / (a.C * rows) / lanes * lanes));
    nx = (W + width - 1) / width;
    // a plane of keys is copied once for all planes of a tile that see it
    most = min<int64_t>(kTilePlanes, max<int64_t>(1, kTileElements / (a.C * rows * width)));
    while (most > 1 && a.B * ((D + most - 1) / most) * ny * nx < kFewTiles) most--;
    split(D, most, planes, nz, 1);
    left = round_up(R[2], lanes);
    halo = round_up(left + width + R[2], lanes);
    passing = max<int64_t>(1, min(min(rows + 2 * R[1], H), kNearElements / (2 * (a.C + 1) * lanes)));
    n = nz * ny * nx;
  }

  // Cuts `size` into the fewest parts of at most `most`, as even as can be, each but the last a multiple of `unit`.
  static void split(int64_t size, int64_t most, int64_t& part, int64_t& parts, int64_t unit) {
    parts = (size + most - 1) / most;
    part = min(most, round_up((size + parts - 1) / parts, unit));
    parts = (size + part - 1) / part;
  }

  // Elements of a channel of a tile; and with the row more that a pair of rows at an odd end looks at.
  int64_t tile_size() const { return planes * rows * width; }
  int64_t padded_size() const { return tile_size() + width; }

  // Rows (z, y..) of the channels of group j in batch b, from voxel x on.
  Rows rows_of(int64_t b, int64_t j, int64_t z, int64_t y, int64_t x) const {
    return {((b * a.J + j) * a.C * D + z) * H * W + y * W + x, D * H * W, W};
  }
};

// One tile: its origin and its extent inside the image.
template <class A>
struct VeuTile {
  int64_t z, y, x, nz, ny, nx;

  VeuTile(const VeuTiles<A>& t, int64_t tile)
      : z(tile / (t.ny * t.nx) * t.planes),
        y(tile / t.nx % t.ny * t.rows),
        x(tile % t.nx * t.width),
        nz(min(t.planes, t.D - z)),
        ny(min(t.rows, t.H - y)),
        nx(min(t.width, t.W - x)) {}

  // Calls f(z, y, row of the tile) for every row.
  template <class F>
  void for_rows(const VeuTiles<A>& t, const F& f) const {
    for (int64_t i = 0; i < nz; i++)
      for (int64_t k = 0; k < ny; k++) f(z + i, y + k, i * t.rows + k);
  }
};

// Offset of voxel (z, y, x) of channel c, of `channels`, in batch b.
template <class A>
inline int64_t at(const VeuTiles<A>& t, int64_t b, int64_t channels, int64_t c, int64_t z, int64_t y, int64_t x) {
  return (((b * channels + c) * t.D + z) * t.H + y) * t.W + x;
}

// Queries (or keys) of a tile in group j: dst [planes, rows, C, width], zero beyond the image.
template <class A>
inline void load_tile(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t b, int64_t j, A factor,
                      A* dst) {
  const int64_t C = t.a.C, row = C * t.width;
  for (int64_t i = 0; i < tile.nz; i++)
    load_rows(t.a.dtype, src, t.rows_of(b, j, tile.z + i, tile.y, tile.x), C, tile.ny, tile.nx, factor,
              dst + i * t.rows * row, {0, t.width, row});
  for (int64_t i = 0; tile.nx < t.width && i < tile.nz * t.rows * C; i++)
    fill(dst + i * t.width + tile.nx, t.width - tile.nx, A(0));
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

// Feature rows (z, y..) of group j inside the image: n rows, `row` apart, of dst [C, halo].
template <class A>
inline void load_features(const VeuTiles<A>& t, const Inside& in, const void* src, int64_t b, int64_t j, int64_t z,
                          int64_t y, int64_t n, A factor, A* dst, int64_t row) {
  load_rows(t.a.dtype, src, t.rows_of(b, j, z, y, in.x0), t.a.C, n, in.end - in.begin, factor, dst,
            {in.begin, t.halo, row});
}

// What lies outside the image in `passing` rows of features [C, halo] and what follows them, `row` apart: zeros.
template <class A>
inline void clear_features(const VeuTiles<A>& t, const Inside& in, A* dst, int64_t row) {
  for (int64_t i = 0; i < t.passing; i++)
    for (int64_t c = 0; c < t.a.C; c++) fill_outside(t, in, A(0), dst + i * row + c * t.halo);
}

// Key rows with their halo, of features [C, halo] and a bias [halo]: 0 where a key takes part, -inf elsewhere.
// What does not depend on the rows is written once for all tiles between the same columns.
template <class A>
inline void clear_keys(const VeuTiles<A>& t, const Inside& in, A* keys) {
  const int64_t row = (t.a.C + 1) * t.halo;
  clear_features(t, in, keys, row);
  for (int64_t i = 0; i < t.passing; i++) {
    A* bias = keys + i * row + t.a.C * t.halo;
    fill_outside(t, in, -kInf<A>, bias);
    fill(bias + in.begin, in.end - in.begin, A(0));
  }
}

// Key rows (z, y..), n of them, into what `clear_keys` prepared. Keys that do not take part are zero, so that nothing
// they hold (a NaN, say) reaches the sums.
template <class A>
inline void load_keys(const VeuTiles<A>& t, const Inside& in, int64_t b, int64_t j, int64_t z, int64_t y, int64_t n,
                      A* keys) {
  const Veu& a = t.a;
  const int64_t row = (a.C + 1) * t.halo;
  load_features(t, in, a.k, b, j, z, y, n, A(1), keys, row);
  for (int64_t y1 = 0; a.mask && y1 < n; y1++) {
    const bool* mask = a.mask + at(t, b, 1, 0, z, y + y1, in.x0);
    A *key = keys + y1 * row, *bias = key + a.C * t.halo;
    for (int64_t i = in.begin; i < in.end; i++) {
      bias[i] = mask[i - in.begin] ? A(0) : -kInf<A>;
      for (int64_t c = 0; !mask[i - in.begin] && c < a.C; c++) key[c * t.halo + i] = 0;
    }
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
  for (int64_t z = max<int64_t>(0, tile.z - t.R[0]); z < min(t.D, tile.z + tile.nz + t.R[0]); z++)
    for (int64_t y = y0; y < y1; y += t.passing) f(z, y, min(t.passing, y1 - y));
}

// Rows first..last - 1 of a block that passes a tile.
struct Reach {
  int64_t first, last;
};

// A block of rows that passes kRows neighbouring rows of a tile: what each of them sees of it, and how far its first
// row is from theirs along D and H.
struct Passing {
  Reach seen[kRows];
  int64_t oz, oy[kRows];
};

// For each kRows neighbouring rows of a tile whose windows reach plane z, calls f(the first of them, their view of the
// block of n rows (z, y..)).
template <class A, class F>
inline void for_row_pairs(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t z, int64_t y, int64_t n, const F& f) {
  for (int64_t i = max<int64_t>(0, z - t.R[0] - tile.z); i < min(tile.nz, z + t.R[0] + 1 - tile.z); i++)
    for (int64_t row = 0; row < tile.ny; row += kRows) {
      Passing block;
      block.oz = z - (tile.z + i);
      for (int r = 0; r < kRows; r++) {
        const int64_t oy = block.oy[r] = y - (tile.y + row + r);
        block.seen[r] = {min(n, max<int64_t>(0, -t.R[1] - oy)), max<int64_t>(0, min(n, t.R[1] + 1 - oy))};
        if (row + r >= tile.ny) block.seen[r] = {n, n};
      }
      f(i * t.rows + row, block);
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

// Online softmax of a tile's rows: a stand-in for the maximum, sum and moments along the three axes, each
// [planes, rows, width]. The stand-in is a score that was the maximum once, and is raised where another exceeds it by
// more than kSlack: seldom, so that no exponential waits for a maximum.
template <class A>
struct Softmax {
  A *top, *sum, *moment[3];
};

// A block of key rows against kRows query rows: G offsets, of which the middle one is `middle`. q, keys and state point
// at the vector of voxels and the first offset.
template <int G, class V, class A>
__attribute__((noinline)) void forward_rows(const VeuTiles<A>& t, const A* q, const A* keys, const Passing& block,
                                            A middle, const Softmax<A>& state) {
  const int64_t C = t.a.C;
  V top[kRows], limit[kRows], sum[kRows], along_y[kRows], along_x[kRows];
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    top[r] = load_as<V>(state.top + r * t.width);
    limit[r] = load_as<V>(state.sum + r * t.width) == A(0) ? V{} - kInf<A> : V{} + A(kSlack);
    sum[r] = along_y[r] = along_x[r] = V{};
  });
  for_passing(block.seen, [&](auto rows, auto first, int64_t i) COVER_INLINE_LAMBDA {
    const A* row = keys + i * (C + 1) * t.halo;
    V s[rows][G], peak[rows];
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const V bias = load_once<V>(row + C * t.halo + g);
      unroll<rows>([&](auto j) COVER_INLINE_LAMBDA { s[j][g] = bias - top[first + j]; });
    });
    dot<rows, G>(C, q + first * C * t.width, C * t.width, t.width, row, t.halo, s);
    auto above = V{} > V{};
    unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
      peak[j] = s[j][0];
      unroll<G - 1>([&](auto g) COVER_INLINE_LAMBDA { peak[j] = larger(s[j][g + 1], peak[j]); });
      above |= peak[j] > limit[first + j];
    });
    if (__builtin_expect(any(above), 0))
      unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
        const int r = first + j;
        const auto raised = peak[j] > limit[r];
        const V now = raised ? top[r] + peak[j] : top[r], by = now - top[r];
        const V decay = exp2(by < A(0) ? V{} : -by);  // below 0 where there was no key before
        top[r] = now;
        limit[r] = raised ? V{} + A(kSlack) : limit[r];
        sum[r] *= decay;
        along_x[r] *= decay;
        along_y[r] *= decay;
        unroll<G>([&](auto g) COVER_INLINE_LAMBDA { s[j][g] -= by; });
      });
    unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
      const int r = first + j;
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA { s[j][g] = exp2(s[j][g]); });
      // opposite offsets together: the moment about the middle takes one multiplication for two of them
      V total{}, moment{};
      if (G % 2) total = s[j][G / 2];
      unroll<G / 2>([&](auto g) COVER_INLINE_LAMBDA {
        total += s[j][g] + s[j][G - 1 - g];
        moment += (s[j][G - 1 - g] - s[j][g]) * static_cast<A>((G - 1) / 2.0 - g);
      });
      sum[r] += total;
      along_x[r] += moment;
      along_y[r] += total * static_cast<A>(block.oy[r] + i);
    });
  });
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    if (block.seen[r].first >= block.seen[r].last) return;
    const int64_t at = r * t.width;
    const V by = top[r] - load_as<V>(state.top + at), decay = exp2(by < A(0) ? V{} : -by);
    const auto add = [&](A* to, V value) { store(to + at, load_as<V>(to + at) * decay + value); };
    store(state.top + at, top[r]);
    add(state.sum, sum[r]);
    add(state.moment[2], along_x[r] + sum[r] * middle);
    add(state.moment[1], along_y[r]);
    add(state.moment[0], sum[r] * static_cast<A>(block.oz));
  });
}

template <class A>
struct ForwardBuffers {
  A *q, *keys, *state, *out;
  int64_t cleared = -1;  // the column whose tiles `keys` is prepared for

  static int64_t size(const VeuTiles<A>& t) {
    return (t.a.C + 3) * t.tile_size() + 5 * t.padded_size() + t.passing * (t.a.C + 1) * t.halo;
  }
  ForwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : q(scratch.take(t.a.C * t.tile_size())),
        keys(scratch.take(t.passing * (t.a.C + 1) * t.halo)),
        state(scratch.take(5 * t.padded_size())),
        out(scratch.take(3 * t.tile_size())) {}
};

// v and lse of one tile; `out` [3, planes, rows, width] sums the groups.
template <class A>
inline void forward_tile(const VeuTiles<A>& t, int64_t b, const VeuTile<A>& tile, ForwardBuffers<A>& s) {
  const Veu& a = t.a;
  const int64_t size = t.tile_size(), padded = t.padded_size();
  const Inside in = inside_row(t, tile);
  fill(s.out, 3 * size, A(0));
  if (s.cleared != tile.x) clear_keys(t, in, s.keys);
  s.cleared = tile.x;
  for (int64_t j = 0; j < a.J; j++) {
    load_tile(t, tile, a.q, b, j, static_cast<A>(a.scale * kLog2e), s.q);
    fill(s.state, 5 * padded, A(0));
    const auto state_at = [&](int64_t i) {
      A* p = s.state + i;
      return Softmax<A>{p, p + padded, {p + 2 * padded, p + 3 * padded, p + 4 * padded}};
    };
    for_passing_rows(t, tile, [&](int64_t z, int64_t y, int64_t n) {
      load_keys(t, in, b, j, z, y, n, s.keys);
      for_vectors<A>(tile.nx, [&](int64_t x, auto vector) {
        for_row_pairs(t, tile, z, y, n, [&](int64_t row, const Passing& block) {
          for_chunks(2 * t.R[2] + 1, [&](int64_t o, auto G) {
            forward_rows<G, decltype(vector)>(t, s.q + row * a.C * t.width + x, s.keys + t.left - t.R[2] + x + o, block,
                                              static_cast<A>(o - t.R[2] + (G - 1) / 2.0), state_at(row * t.width + x));
          });
        });
      });
    });
    tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
      const Softmax<A> m = state_at(row * t.width);
      for (int64_t x = 0; x < t.width; x += kLanes<A>) {
        const Vec<A> sum = load(m.sum + x);
        // 1 where there is no key: the moments are 0 there
        const Vec<A> weight = static_cast<A>(1.0 / a.J) / (sum == A(0) ? splat(A(1)) : sum);
        for (int i = 0; i < 3; i++) {
          A* out = s.out + i * size + row * t.width + x;
          store(out, load(out) + load(m.moment[i] + x) * weight);
        }
        const Vec<A> lse = (load(m.top + x) + log2(sum == A(0) ? splat(A(1)) : sum)) * static_cast<A>(kLn2);
        store(m.top + x, sum == A(0) ? splat(-kInf<A>) : lse);
      }
      std::memcpy(static_cast<A*>(a.lse) + at(t, b, a.J, j, z, y, tile.x), m.top, tile.nx * sizeof(A));
    });
  }
  for (int64_t i = 0; i < a.d; i++)
    tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
      std::memcpy(static_cast<A*>(a.v) + at(t, b, a.d, i, z, y, tile.x), s.out + (3 - a.d + i) * size + row * t.width,
                  tile.nx * sizeof(A));
    });
}

template <class A>
inline void veu_fwd(const Veu& a) {
  const VeuTiles<A> t(a);
  parallel_for(a.B * t.n, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(ForwardBuffers<A>::size(t));
    ForwardBuffers<A> buffers(t, scratch);
    for (int64_t i = begin; i < end; i++) forward_tile(t, i / t.n, VeuTile<A>(t, i % t.n), buffers);
  });
}

}  // namespace COVER_ISA
}  // namespace cover
