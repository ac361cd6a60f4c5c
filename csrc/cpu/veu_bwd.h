// Backward of VEU on the CPU (derivation: docs/derivations.md), in two gathers, so that no two threads ever add to
// the same place and the result does not depend on their number.
//
// With D = <g, v>, which needs only the saved output, and weights w recomputed from the saved log-sum-exp:
//   queries:  t(o) = w(o) (<g, o> - D),  A = sum t(o) k(p + o),  grad_q = (A - excess * sum w(o) k(p + o)) scale / J,
//             excess = sum t(o), which is delta_j - D and vanishes when there is one group;
//   keys:     grad_k(p') = sum w (<g, o> - delta_j) q(p' - o) scale / J, delta_j = D + excess of the query.
// The excess of a query reaches the keys through a ring buffer over tiles, 4 MB whatever the image and the window.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kRingElements = 1 << 20;  // of the excess, about
constexpr double kHighest =
    125 - kBound;  // log-sum-exp in base 2 up to which `exp2_within` serves scores within kBound

template <class A>
struct BackwardBuffers {
  A *center, *passing, *sum, *weighted, *grad[3], *inner, *lse, *excess, *across;
  int64_t cleared = -1;  // the column whose tiles `passing` is prepared for

  static int64_t size(const VeuTiles<A>& t) {
    return ((2 * kPerWord + 1) * t.words + 1) * t.tile_size() + t.passing * (t.words + 6) * t.halo +
           6 * max(t.padded_size(), t.halo) + across_size(t);
  }
  BackwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : center(scratch.take((t.words + 1) * t.tile_size())),         // queries or keys of the tile
        passing(scratch.take(t.passing * (t.words + 6) * t.halo)),   // keys or queries of passing rows
        sum(scratch.take(kPerWord * t.words * t.tile_size())),       // sum t k, or the sum of grad_k
        weighted(scratch.take(kPerWord * t.words * t.tile_size())),  // sum w k
        // g, <g, v>, log-sum-exp and excess: of the tile's rows, or of a passing row with its halo
        grad{scratch.take(max(t.padded_size(), t.halo)), scratch.take(max(t.padded_size(), t.halo)),
             scratch.take(max(t.padded_size(), t.halo))},
        inner(scratch.take(max(t.padded_size(), t.halo))),
        lse(scratch.take(max(t.padded_size(), t.halo))),
        excess(scratch.take(max(t.padded_size(), t.halo))),
        across(scratch.take(across_size(t))) {
    fill_across(t, across);
  }
};

// Log-sum-exp in base 2, with +inf where there is no key: 2^(s - inf) = 0 for every s.
template <class A>
inline void lse_to_base2(A* lse, int64_t n) {
  for (int64_t i = 0; i < n; i++) lse[i] = lse[i] == -kInf<A> ? kInf<A> : lse[i] * static_cast<A>(kLog2e);
}

// inner[i] = <g, v>: g is in grad, v is read from rows of [B, d, *S] through `read(axis, dst)`.
template <class A, class Read>
inline void load_inner(const VeuTiles<A>& t, A* const* grad, int64_t n, A* v, A* inner, const Read& read) {
  fill(inner, n, A(0));
  for (int64_t i = 3 - t.a.d; i < 3; i++) {
    read(i - (3 - t.a.d), v);
    for (int64_t x = 0; x < n; x++) inner[x] += grad[i][x] * v[x];
  }
}

// 2^x, and 1 above 0: where scores are so large that log-sum-exp is rounded by more than 1, weights stay weights.
template <class V>
COVER_INLINE V weight(V x) {
  return exp2(x > V{} ? V{} : x);
}

// sum[r][c] += sum_g t[r][g] k[c][. + F + g] for R rows of a tile, and the channels of some words.
template <int R, int F, int G, class A>
COVER_INLINE void add_weighted(int64_t words, const Vec<A> (*t)[G], const A* k, int64_t k_stride, A* sum,
                               int64_t sum_row, int64_t sum_stride) {
  for (int64_t c = 0; c < words; c++, sum += kPerWord * sum_stride) {
    Vec<A> to[R][kPerWord];
    unroll<R * kPerWord>([&](auto i) COVER_INLINE_LAMBDA {
      to[i / kPerWord][i % kPerWord] = load(sum + i / kPerWord * sum_row + i % kPerWord * sum_stride);
    });
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const Vec<A> key = load_beside<F + g>(k + c * k_stride);
      unroll<kPerWord>([&](auto i) COVER_INLINE_LAMBDA {
        const Vec<A> x = channel<i, A>(key);
        unroll<R>([&](auto r) COVER_INLINE_LAMBDA { to[r][i] += t[r][g] * x; });
      });
    });
    unroll<R * kPerWord>([&](auto i) COVER_INLINE_LAMBDA {
      store(sum + i / kPerWord * sum_row + i % kPerWord * sum_stride, to[i / kPerWord][i % kPerWord]);
    });
  }
}

// Products start at the first, and become the second: a score less a log-sum-exp, in base 2.
template <class A>
COVER_INLINE Vec<A> before_products(Vec<A> lse) {
  return kPairs ? Vec<A>{} : -lse;
}
template <class A>
COVER_INLINE Vec<A> after_products(Vec<A> products, A in_products, Vec<A> lse) {
  return kPairs ? products * in_products - lse : products;
}

// Calls f with two conditions as constants; the first is taken for true where the second is false, which is rare.
template <class F>
COVER_INLINE void with_masks(bool masked, bool moderate, const F& f) {
  if (moderate)
    with_constant(masked, [&](auto masked) { f(masked, std::true_type()); });
  else
    f(std::true_type(), std::false_type());
}

// A block of key rows against kRows query rows: adds to sum, weighted [channels, width] and excess [width] for G
// offsets, of which that of `keys` is ox. Without kMasked all keys take part; with kModerate no score is beyond kBound,
// and no log-sum-exp, to which keys elsewhere add, beyond kHighest.
template <int G, bool kGroups, bool kMasked, bool kModerate, class A>
__attribute__((noinline)) void query_rows(const VeuTiles<A>& t, const BackwardBuffers<A>& s, int64_t row, int64_t x,
                                          const A* keys, const Bits<A>& bits, const Passing& block, A ox) {
  constexpr int F = -((G - 1) / 2);
  const int64_t words = t.words, row_size = kPerWord * words * t.width, at = row * t.width + x;
  const int64_t first_row = row * row_size + x, center_size = (words + 1) * t.width;
  const A* center = s.center + row * center_size + x;
  Vec<A> base[kRows], grad_y[kRows], grad_x[kRows], lse[kRows], excess[kRows];
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    const int64_t i = at + r * t.width;
    grad_y[r] = load(s.grad[1] + i);
    grad_x[r] = load(s.grad[2] + i);
    base[r] = load(s.grad[0] + i) * static_cast<A>(block.oz) - load(s.inner + i) + grad_x[r] * (ox + F);
    lse[r] = load(s.lse + i);
    excess[r] = Vec<A>{};
  });
  for_passing(block.seen, [&](auto rows, auto first, int64_t i) COVER_INLINE_LAMBDA {
    const A* key = keys + i * (words + 2) * t.halo;
    Vec<A> w[rows][G], to[rows][G];
    unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA { w[j][g] = before_products<A>(lse[first + j]); });
    });
    dot<rows, F, G>(0, words, center + first * center_size, center_size, t.width, key, t.halo, 0, w);
    unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
      const int r = first + j;
      Vec<A> offset = base[r] + grad_y[r] * static_cast<A>(block.oy[r] + i);
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
        const Vec<A> exponent = after_products<A>(w[j][g], t.in_products, lse[r]);
        w[j][g] = kModerate ? exp2_within(exponent) : weight(exponent);
        if (kMasked) w[j][g] = where_set(w[j][g], bits.at(i, F + g));
        to[j][g] = w[j][g] * offset;
        offset += grad_x[r];
        if (kGroups) excess[r] += to[j][g];
      });
    });
    add_weighted<rows, F, G>(words, to, key, t.halo, s.sum + first_row + first * row_size, row_size, t.width);
    if (kGroups)
      add_weighted<rows, F, G>(words, w, key, t.halo, s.weighted + first_row + first * row_size, row_size, t.width);
  });
  unroll<kGroups ? kRows : 0>([&](auto r) COVER_INLINE_LAMBDA {
    if (block.seen[r].first >= block.seen[r].last) return;
    A* p = s.excess + at + r * t.width;
    store(p, load(p) + excess[r]);
  });
}

// A block of query rows, at -oz, -oy[r] - i, against kRows key rows: adds to sum [channels, width] for G queries, of
// which that of `queries` is ox away from the key. A query row is [words + 6, halo]: its features, their squared
// length, -delta_j, g_z, g_y, g_x and its log-sum-exp. kMasked and kModerate are as above.
template <int G, bool kMasked, bool kModerate, class A>
__attribute__((noinline)) void key_rows(const VeuTiles<A>& t, const BackwardBuffers<A>& s, int64_t row, int64_t x,
                                        const A* queries, const Bits<A>& bits, const Passing& block, A ox) {
  constexpr int F = -((G - 1) / 2);
  const int64_t words = t.words, row_size = kPerWord * words * t.width;
  const int64_t first_row = row * row_size + x, center_size = (words + 1) * t.width;
  const A* center = s.center + row * center_size + x;
  for_passing(block.seen, [&](auto rows, auto first, int64_t i) COVER_INLINE_LAMBDA {
    const A* query = queries + i * (words + 6) * t.halo;
    const A* base = query + (words + 1) * t.halo;
    const A *grad_z = base + t.halo, *grad_y = grad_z + t.halo, *grad_x = grad_y + t.halo, *lse = grad_x + t.halo;
    const A z = static_cast<A>(block.oz), y = static_cast<A>(-block.oy[first] - i);
    Vec<A> w[rows][G];
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const Vec<A> start = before_products<A>(load_once(lse + F + g));
      unroll<rows>([&](auto j) COVER_INLINE_LAMBDA { w[j][g] = start; });
    });
    dot<rows, F, G>(0, words, center + first * center_size, center_size, t.width, query, t.halo, 0, w);
    unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
      const Vec<A> slope = load_once(grad_y + F + g);
      Vec<A> offset = load(base + F + g) + load(grad_x + F + g) * (ox - static_cast<A>(F + g)) + slope * y;
      if (z != 0) offset -= load(grad_z + F + g) * z;
      unroll<rows>([&](auto j) COVER_INLINE_LAMBDA {
        const Vec<A> exponent = after_products<A>(w[j][g], t.in_products, load(lse + F + g));
        w[j][g] = kModerate ? exp2_within(exponent) : weight(exponent);
        if (kMasked) w[j][g] = where_set(w[j][g], bits.at(i, F + g));
        w[j][g] *= offset;
        offset += slope;  // the next key row
      });
    });
    add_weighted<rows, F, G>(words, w, query, t.halo, s.sum + first_row + first * row_size, row_size, t.width);
  });
}

// grad_q of one tile in group j; leaves the excess of its queries in `ring` [planes, rows, width].
template <class A>
inline void grad_queries(const VeuTiles<A>& t, int64_t b, int64_t j, const VeuTile<A>& tile, BackwardBuffers<A>& s,
                         A* ring) {
  const Veu& a = t.a;
  const int64_t size = t.padded_size();
  load_tile(t, tile, a.q, b, j, t.in_queries, s.center);
  const A longest_query = longest_in_tile(t, tile, s.center);
  const auto load_acc = [&](const void* src, int64_t channels, int64_t c, int64_t apart, A outside, A* dst) {
    fill(dst, size, outside);
    tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
      load_row(t, src, b, channels, c, apart, z, y, tile.x, tile.nx, dst + row * t.width);
    });
  };
  fill(s.grad[0], size, A(0));
  for (int64_t i = 0; i < a.d; i++) load_acc(a.grad_v, a.d, i, 0, A(0), s.grad[3 - a.d + i]);
  load_inner(t, s.grad, size, s.excess, s.inner, [&](int64_t i, A* v) { load_acc(a.v, a.d, i, 0, A(0), v); });
  load_acc(a.lse, a.J, j, 1, -kInf<A>, s.lse);
  lse_to_base2(s.lse, size);
  // not that of voxels beyond the image, and of queries without a key, which only a mask leaves
  Vec<A> highest{};
  for (int64_t x = 0; x < size; x += kLanes<A>) {
    const Vec<A> lse = load(s.lse + x);
    highest = larger(lse == kInf<A> ? Vec<A>{} : lse, highest);
  }
  const bool moderate = largest<A>(highest) <= static_cast<A>(kHighest);
  fill(s.excess, size, A(0));
  const int64_t sums = kPerWord * t.words;
  fill(s.sum, sums * t.tile_size(), A(0));
  if (a.J > 1) fill(s.weighted, sums * t.tile_size(), A(0));
  const Inside in = inside_row(t, tile);
  if (s.cleared != tile.x) clear_keys(t, in, s.passing);
  s.cleared = tile.x;
  for_passing_rows(t, tile, [&](int64_t z, int64_t y, int64_t n) {
    load_keys(t, in, b, j, z, y, n, s.passing);
    for (int64_t x = 0; x < tile.nx; x += kLanes<A>) {
      const A longest_key = largest_seen(t, s.passing + t.words * t.halo, (t.words + 2) * t.halo, n, x);
      const bool masked = sees_masked(t, tile, x), safe = moderate && bounded(t, longest_query, longest_key);
      for_row_pairs(t, tile, z, y, n, [&](int64_t row, const Passing& block) {
        for_chunks(t.R[2], [&](int64_t o, auto G) {
          const A* keys = s.passing + t.left + x + o;
          const Bits<A> bits = bits_of_keys(t, s.across, s.passing, x, o);
          with_constant(a.J > 1, [&](auto groups) {
            with_masks(masked, safe, [&](auto masked, auto safe) {
              query_rows<G, groups, masked, safe>(t, s, row, x, keys, bits, block, static_cast<A>(o));
            });
          });
        });
      });
    }
  });
  tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
    for (int64_t c = 0; c < a.C; c++) {
      A* sum = s.sum + (row * sums + c) * t.width;
      if (a.J > 1)
        for (int64_t x = 0; x < t.width; x++)
          sum[x] -= s.excess[row * t.width + x] * s.weighted[(row * sums + c) * t.width + x];
      for_groups(t, tile.nx, [&](int64_t group, int64_t first, int64_t n) {
        store_row(a.dtype, a.grad_q, at(t, b, a.J * a.C, (j + group) * a.C + c, z, y, tile.x), n,
                  static_cast<A>(a.scale / a.J), sum + first);
      });
    }
  });
  if (ring) std::memcpy(ring, s.excess, t.tile_size() * sizeof(A));
}

// grad_k of one tile in group j. `excess(z, y, x0, n, dst)` copies a row of the queries' excess, where there is any.
template <class A, class Excess>
inline void grad_keys(const VeuTiles<A>& t, int64_t b, int64_t j, const VeuTile<A>& tile, BackwardBuffers<A>& s,
                      const Excess& excess) {
  const Veu& a = t.a;
  load_tile(t, tile, a.k, b, j, A(1), s.center);
  const A longest_key = longest_in_tile(t, tile, s.center);
  const int64_t sums = kPerWord * t.words, row_size = (t.words + 6) * t.halo;
  fill(s.sum, sums * t.tile_size(), A(0));
  const Inside in = inside_row(t, tile);
  if (s.cleared != tile.x) clear_rows(t, in, t.words + 6, s.passing);
  s.cleared = tile.x;
  for_passing_rows(t, tile, [&](int64_t z, int64_t y, int64_t n) {
    load_features(t, a.q, b, j, z, y, in.x0, n, in.end - in.begin, t.in_queries, s.passing + in.begin, t.halo,
                  row_size);
    for (int64_t i = 0; i < n; i++) {
      A *base = s.passing + i * row_size + (t.words + 1) * t.halo, *lse = base + 4 * t.halo;
      A* const grad[3] = {base + t.halo, base + 2 * t.halo, base + 3 * t.halo};
      for (int64_t axis = 0; axis < 3 - a.d; axis++) fill(grad[axis], t.halo, A(0));
      const auto load_acc = [&](const void* src, int64_t channels, int64_t c, int64_t apart, A outside, A* dst) {
        fill_outside(t, in, outside, dst);
        load_row(t, src, b, channels, c, apart, z, y + i, in.x0, in.end - in.begin, dst + in.begin);
      };
      for (int64_t axis = 0; axis < a.d; axis++) load_acc(a.grad_v, a.d, axis, 0, A(0), grad[3 - a.d + axis]);
      load_inner(t, grad, t.halo, base, s.inner, [&](int64_t axis, A* v) { load_acc(a.v, a.d, axis, 0, A(0), v); });
      load_acc(a.lse, a.J, j, 1, -kInf<A>, lse);
      lse_to_base2(lse, t.halo);
      if (a.J > 1) {
        excess(z, y + i, in.x0, in.end - in.begin, s.excess);
        for (int64_t x = in.begin; x < in.end; x++) s.inner[x] += s.excess[x - in.begin];
      }
      for (int64_t x = 0; x < t.halo; x++) base[x] = -s.inner[x];
    }
    for (int64_t x = 0; x < tile.nx; x += kLanes<A>) {
      const A longest_query = largest_seen(t, s.passing + t.words * t.halo, row_size, n, x);
      const A highest = largest_seen(t, s.passing + (t.words + 5) * t.halo, row_size, n, x);
      // queries beyond the image weigh nothing, by a log-sum-exp that is not moderate; those of a group beside it do
      const bool edge = sees_masked(t, tile, x), masked = edge && t.fold > 1;
      const bool safe = edge == masked && bounded(t, longest_query, longest_key) && highest <= static_cast<A>(kHighest);
      for_row_pairs(t, tile, z, y, n, [&](int64_t row, const Passing& block) {
        for_chunks(t.R[2], [&](int64_t o, auto G) {
          const A* queries = s.passing + t.left + x + o;
          const Bits<A> bits = bits_across(t, s.across, x, o);
          with_masks(masked, safe, [&](auto masked, auto safe) {
            key_rows<G, masked, safe>(t, s, row, x, queries, bits, block, static_cast<A>(-o));
          });
        });
      });
    }
  });
  tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
    const bool* mask = a.mask ? a.mask + at(t, b, 1, 0, z, y, tile.x) : nullptr;
    for (int64_t c = 0; c < a.C; c++) {
      A* sum = s.sum + (row * sums + c) * t.width;
      for (int64_t x = 0; mask && x < tile.nx; x++)
        if (!mask[x]) sum[x] = 0;
      // the queries, or their products, carried scale * log2(e)
      for_groups(t, tile.nx, [&](int64_t group, int64_t first, int64_t n) {
        store_row(a.dtype, a.grad_k, at(t, b, a.J * a.C, (j + group) * a.C + c, z, y, tile.x), n,
                  static_cast<A>(kLn2 / a.J) * t.in_products, sum + first);
      });
    }
  });
}

// Tiles of the rows [low, high) of tiles of every slab of planes, in the order of z, y, x.
template <class A>
struct Strip {
  const VeuTiles<A>& t;
  int64_t low, high;
  int64_t slab() const { return (high - low) * t.nx; }
  int64_t count() const { return t.nz * slab(); }
  int64_t row(int64_t i) const { return low + i / t.nx % (high - low); }
  VeuTile<A> operator[](int64_t i) const { return VeuTile<A>(t, (i / slab() * t.ny + row(i)) * t.nx + i % t.nx); }
  // The tile that holds voxel row y of plane z and voxels from tile_x * width on.
  int64_t index(int64_t z, int64_t y, int64_t tile_x) const {
    return z / t.planes * slab() + (y / t.rows - low) * t.nx + tile_x;
  }
};

template <class A>
inline void veu_bwd(const Veu& a) {
  const VeuTiles<A> t(a);
  const int64_t folded = a.J / t.fold, tile_size = t.tile_size(), images = a.B * folded,
                most = kRingElements / tile_size;
  // slabs and rows of tiles that a tile's keys see on either side
  const int64_t deep = (t.R[0] + t.planes - 1) / t.planes, halo = (t.R[1] + t.rows - 1) / t.rows;
  // where window-deep slabs are too large for the ring, strips of them follow each other
  int64_t strip_rows = t.ny;
  const auto needed = [&] { return (2 * deep + 1) * min(t.ny, strip_rows + 2 * halo) * t.nx; };
  while (a.J > 1 && strip_rows > 1 && needed() > most) strip_rows = (strip_rows + 1) / 2;
  for (int64_t y = 0; y < t.ny; y += strip_rows) {
    const int64_t end = min(t.ny, y + strip_rows);
    const Strip<A> strip{t, max<int64_t>(0, y - halo), min(t.ny, end + halo)};
    const int64_t n = strip.count(), slab = strip.slab();
    // this many tiles on either side hold every query that a tile's keys see
    const int64_t reach = deep * slab + (halo + 1) * t.nx;
    // images that are worked on together, and tiles of each between two turns of the ring
    int64_t together = images, step = n, ring_tiles = 0;
    if (a.J > 1) {
      together = max<int64_t>(1, min(images, most / n));
      if (n > most) step = max(slab, most - 2 * reach);
      ring_tiles = min(n, step + 2 * reach);
    }
    Scratch<A> ring_memory(together * ring_tiles * tile_size);
    A* ring = a.J > 1 ? ring_memory.take(together * ring_tiles * tile_size) : nullptr;
    const auto slot = [&](int64_t image, int64_t tile) {
      return ring + (image % together * ring_tiles + tile % ring_tiles) * tile_size;
    };
    // calls f(image, tile, buffers) for tiles [first, last) of every image of a batch of images, on all threads
    const auto for_tiles = [&](int64_t first_image, int64_t first, int64_t last, const auto& f) {
      const int64_t tiles = last - first;
      parallel_for(min(together, images - first_image) * tiles, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(BackwardBuffers<A>::size(t));
        BackwardBuffers<A> buffers(t, scratch);
        for (int64_t i = begin; i < end; i++) f(first_image + i / tiles, first + i % tiles, buffers);
      });
    };
    for (int64_t image = 0; image < images; image += together) {
      int64_t done = 0;
      for (int64_t first = 0; first < n; first += step) {
        const int64_t last = min(n, first + step), ready = min(n, last + reach);
        for_tiles(image, done, ready, [&](int64_t i, int64_t tile, BackwardBuffers<A>& s) {
          grad_queries(t, i / folded, i % folded * t.fold, strip[tile], s, a.J > 1 ? slot(i, tile) : nullptr);
        });
        done = ready;
        for_tiles(image, first, last, [&](int64_t i, int64_t tile, BackwardBuffers<A>& s) {
          if (strip.row(tile) < y || strip.row(tile) >= end) return;
          grad_keys(t, i / folded, i % folded * t.fold, strip[tile], s,
                    [&](int64_t z, int64_t y, int64_t x, int64_t n, A* dst) {
                      for (int64_t x1 = x; x1 < x + n;) {
                        const int64_t tile_x = x1 / t.width, stop = min(x + n, (tile_x + 1) * t.width);
                        const A* row =
                            slot(i, strip.index(z, y, tile_x)) + (z % t.planes * t.rows + y % t.rows) * t.width;
                        std::memcpy(dst + x1 - x, row + x1 - tile_x * t.width, (stop - x1) * sizeof(A));
                        x1 = stop;
                      }
                    });
        });
      }
    }
  }
}

}  // namespace COVER_ISA
}  // namespace cover
