// What VEU's forward and backward share: how a call is cut into tiles, the copying of key rows with their halo, and the
// passing of those by pairs of a tile's rows.
//
// A tile is `planes` by `rows` voxel rows of `width` voxels; lanes are neighbouring voxels along W. Every row that some
// window of the tile sees is copied once into a zero-padded buffer (which also converts the storage type), a block of
// rows at a time, and used by all rows of the tile within reach. Two rows of the tile share each load of a passing one.
//
// Rows that would leave many lanes empty lie side by side for several groups: `fold` of them make one row, and bits say
// for each offset which lanes would look across from one group into another.
namespace cover {
namespace COVER_ISA {

constexpr int kChunk = 8;  // scores of a row that are in registers at once; wider windows take several chunks
constexpr int kRows = COVER_REGISTERS >= 32 ? 2 : 1;  // rows of a tile that share the loads: what registers allow
constexpr int64_t kTileElements = 65536;              // of a tile's features: a quarter of a second-level cache of 1 MB
constexpr int64_t kPassingElements = 98304;         // of the rows that pass it and are in memory at once: somewhat more
constexpr int64_t kTileRows = 16, kTilePlanes = 8;  // of a tile at most,
constexpr int64_t kFewTiles = 4;                    // and fewer planes rather than fewer tiles than this
constexpr int kSideBySide = 4, kTogether = 8;       // vectors of a row, and channels, that are copied in turn
constexpr int64_t kFoldElements = 8192;             // of the bits for folded rows, at most
constexpr double kBound = 48;                       // scores up to this, in powers of 2, are safe without their maximum
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
#ifdef COVER_PAIRS
constexpr int kPerWord = 2;  // channels of bfloat16 that lie side by side in one float's place
#else
constexpr int kPerWord = 1;
#endif
constexpr bool kPairs = kPerWord > 1;

// The geometry of a VEU call: how it is cut into tiles.
template <class A>
struct VeuTiles {
  const Veu& a;
  int64_t D, H, W, R[3];        // R: the window's radii
  int64_t fold, row;            // groups that lie side by side, and the voxels of such a row
  int64_t words;                // that hold the channels of a voxel, each of an A's size
  A in_queries, in_products;    // factors that make scores in base 2: pairs cannot hold the first
  int64_t planes, rows, width;  // of a tile; width is a multiple of the lanes
  int64_t left, halo;           // of a padded row: where the tile's first voxel is, and its width
  int64_t passing;              // padded rows that are in memory at once
  int64_t nz, ny, nx, n;        // tiles along D, H and W, and per (batch or group)

  explicit VeuTiles(const Veu& a)
      : a(a),
        D(a.S[0]),
        H(a.S[1]),
        W(a.S[2]),
        words((a.C + kPerWord - 1) / kPerWord),
        in_queries(kPairs ? A(1) : static_cast<A>(a.scale * kLog2e)),
        in_products(kPairs ? static_cast<A>(a.scale * kLog2e) : A(1)) {
    // a window wider than the image sees no more than one as wide as the image
    for (int i = 0; i < 3; i++) R[i] = min((a.N[i] - 1) / 2, a.S[i] - 1);
    const int64_t lanes = kLanes<A>;
    // as few groups as fill the lanes best: more only where that saves a ninth
    fold = 1;
    for (int64_t n = 2; n <= a.J && !a.mask; n++) {
      const int64_t folded = round_up(n * W, lanes);
      if (a.J % n == 0 && folded * (2 * R[2] + 1) <= kFoldElements && words * folded <= kTileElements &&
          9 * fold * folded <= 8 * n * round_up(fold * W, lanes))
        fold = n;
    }
    row = fold * W;
    const int64_t least = fold > 1 ? round_up(row, lanes) : lanes;  // a folded row is not cut
    int64_t most = kTileRows;
    while (most > 1 && words * most * least > kTileElements) most /= 2;
    split(H, most, rows, ny, kRows);
    width = max(lanes, min(round_up(row, lanes), kTileElements / (words * rows) / lanes * lanes));
    nx = (row + width - 1) / width;
    // a plane of keys is copied once for all planes of a tile that see it
    most = min<int64_t>(kTilePlanes, max<int64_t>(1, kTileElements / (words * rows * width)));
    while (most > 1 && a.B * ((D + most - 1) / most) * ny * nx < kFewTiles) most--;
    split(D, most, planes, nz, 1);
    left = round_up(R[2], lanes);
    halo = round_up(left + width + R[2], lanes);
    passing = max<int64_t>(1, min(min(rows + 2 * R[1], H), kPassingElements / ((words + 1) * halo)));
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
        nx(min(t.width, t.row - x)) {}

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

// The part of a padded row that lies inside the image: dst[begin..end) holds voxels x0..
struct Inside {
  int64_t begin, end, x0;
};
template <class A>
inline Inside inside_row(const VeuTiles<A>& t, const VeuTile<A>& tile) {
  const int64_t x0 = max<int64_t>(0, tile.x - t.R[2]), x1 = min(t.row, tile.x + t.width + t.R[2]);
  return {t.left + x0 - tile.x, t.left + x1 - tile.x, x0};
}

// Fills a padded row outside the image.
template <class A>
inline void fill_outside(const VeuTiles<A>& t, const Inside& in, A value, A* dst) {
  fill(dst, in.begin, value);
  fill(dst + in.end, t.halo - in.end, value);
}

// Calls f(group, first, voxels) for the groups that lie side by side in n voxels of a row.
template <class A, class F>
inline void for_groups(const VeuTiles<A>& t, int64_t n, const F& f) {
  const int64_t part = min(n, t.W);
  for (int64_t i = 0; i * part < n; i++) f(i, i * part, part);
}

// n voxels of a row of an acc tensor [B, channels, *S], from channel c on; groups are `apart` channels from each other.
template <class A>
inline void load_row(const VeuTiles<A>& t, const void* src, int64_t b, int64_t channels, int64_t c, int64_t apart,
                     int64_t z, int64_t y, int64_t x, int64_t n, A* dst) {
  for_groups(t, n, [&](int64_t group, int64_t first, int64_t part) {
    const A* from = static_cast<const A*>(src) + at(t, b, channels, c + group * apart, z, y, x);
    std::memcpy(dst + first, from, part * sizeof(A));
  });
}

// Two channels of the first n <= kLanes<A> voxels, in pairs; `second` is null where there is none.
#ifdef COVER_PAIRS
COVER_INLINE Vec<float> load_pairs(const BFloat16* first, const BFloat16* second, int64_t n) {
  const auto wide = [n](const BFloat16* p) COVER_INLINE_LAMBDA {
    return p ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1 << n) - 1, p)) : _mm512_setzero_si512();
  };
  return (Vec<float>)_mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16));
}
#endif

// One channel of those in words.
template <int i, class A>
COVER_INLINE Vec<A> channel(Vec<A> words) {
  if constexpr (kPairs) {
    using Bits = Lanes<uint32_t, kLanes<A>>;
    return (Vec<A>)(i == 0 ? (Bits)words << 16 : (Bits)words & 0xffff0000u);
  } else {
    return words;
  }
}

// Their squares, added up within a word.
template <class A>
COVER_INLINE Vec<A> squared(Vec<A> words) {
  Vec<A> sum{};
  unroll<kPerWord>([&](auto i) COVER_INLINE_LAMBDA {
    const Vec<A> x = channel<i, A>(words);
    sum += x * x;
  });
  return sum;
}

// n rows of features of one group, `width` voxels each, from `src` [C, *S], times a factor (1 for pairs), into rows
// that are `row` apart of dst [words, stride], each followed by the squared lengths of its voxels' features.
template <class T, class A>
inline void copy_features(const VeuTiles<A>& t, const T* src, int64_t n, int64_t width, A factor, A* dst,
                          int64_t stride, int64_t row) {
  constexpr int64_t lanes = kLanes<A>;
  using Several = std::integral_constant<int, kSideBySide>;
  using One = std::integral_constant<int, 1>;
  const int64_t C = t.a.C, words = t.words, W = t.W, numel = t.D * t.H * W;
  A* const squares = dst + words * stride;
  for (int64_t first = 0; first < words; first += kTogether)
    for (int64_t i = 0; i < n; i++) {
      int64_t x = 0;
      // vectors of a row, of which a single one may have less than all lanes left
      const auto copy = [=](auto vectors, int64_t x, int64_t left) COVER_INLINE_LAMBDA {
        const auto put = [=](A* p, Vec<A> v)
                             COVER_INLINE_LAMBDA { left == lanes ? store(p, v) : store_part(p, v, left); };
        A* const square = squares + i * row + x;
        Vec<A> sum[vectors] = {};
        unroll<vectors>([&](auto v) COVER_INLINE_LAMBDA {
          if (first > 0) sum[v] = left == lanes ? load(square + v * lanes) : load_part<A>(square, left);
        });
        for (int64_t c = first; c < min(words, first + kTogether); c++)
          unroll<vectors>([&](auto v) COVER_INLINE_LAMBDA {
            const T* const p = src + kPerWord * c * numel + i * W + x + v * lanes;
            // channels take turns, so that a processor does not see what comes next
            for (int k = 0; k < kPerWord; k++) __builtin_prefetch(p + k * numel + kSideBySide * lanes);
#ifdef COVER_PAIRS
            const Vec<A> value = load_pairs(p, kPerWord * c + 1 < C ? p + numel : nullptr, left);
#else
            const Vec<A> value = (left == lanes ? load_converted<A>(p) : load_part<A>(p, left)) * factor;
#endif
            put(dst + c * stride + i * row + x + v * lanes, value);
            sum[v] += squared<A>(value);
          });
        unroll<vectors>([&](auto v) COVER_INLINE_LAMBDA { put(square + v * lanes, sum[v]); });
      };
      for (; x + kSideBySide * lanes <= width; x += kSideBySide * lanes) copy(Several(), x, lanes);
      for (; x + lanes <= width; x += lanes) copy(One(), x, lanes);
      if (x < width) copy(One(), x, width - x);
    }
}

// Feature rows (z, y..) from group j on, `width` voxels from x on, as `copy_features` leaves them.
template <class A>
inline void load_features(const VeuTiles<A>& t, const void* src, int64_t b, int64_t j, int64_t z, int64_t y, int64_t x,
                          int64_t n, int64_t width, A factor, A* dst, int64_t stride, int64_t row) {
  for_groups(t, width, [&](int64_t group, int64_t first, int64_t part) {
    const int64_t from = at(t, b, t.a.J * t.a.C, (j + group) * t.a.C, z, y, x);
    const auto copy = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      copy_features(t, static_cast<const T*>(src) + from, n, part, factor, dst + first, stride, row);
    };
    if constexpr (kPairs)
      copy(static_cast<BFloat16*>(nullptr));
    else
      with_storage(t.a.dtype, copy);
  });
}

// Queries (or keys) of a tile from group j on, and their squared lengths: dst [planes, rows, words + 1, width], zero
// beyond the image.
template <class A>
inline void load_tile(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t b, int64_t j, A factor,
                      A* dst) {
  const int64_t row = (t.words + 1) * t.width;
  for (int64_t i = 0; i < tile.nz; i++)
    load_features(t, src, b, j, tile.z + i, tile.y, tile.x, tile.ny, tile.nx, factor, dst + i * t.rows * row, t.width,
                  row);
  for (int64_t i = 0; tile.nx < t.width && i < tile.nz * t.rows * (t.words + 1); i++)
    fill(dst + i * t.width + tile.nx, t.width - tile.nx, A(0));
}

// What lies outside the image in all padded rows, of `channels` channels: zeros.
template <class A>
inline void clear_rows(const VeuTiles<A>& t, const Inside& in, int64_t channels, A* dst) {
  for (int64_t i = 0; i < t.passing * channels; i++) fill_outside(t, in, A(0), dst + i * t.halo);
}

// Key rows with their halo: features [words, halo], their squared lengths [halo] and bits [halo], set where a key takes
// part. What does not depend on the rows is written once for all tiles between the same columns.
template <class A>
inline void clear_keys(const VeuTiles<A>& t, const Inside& in, A* keys) {
  const int64_t words = t.words;
  clear_rows(t, in, words + 2, keys);
  for (int64_t i = 0; i < t.passing; i++)
    fill(keys + (i * (words + 2) + words + 1) * t.halo + in.begin, in.end - in.begin, all_bits<A>());
}

// Whether some window of the vector at x of a tile reaches beyond the image along W, or there is a mask.
template <class A>
inline bool sees_masked(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t x) {
  const int64_t first = (tile.x + x) % t.W;
  return t.a.mask || first < t.R[2] || first + kLanes<A> + t.R[2] > t.W;
}

// Bits of the offsets of one vector of voxels, set where what a passing row holds there takes part.
template <class A>
struct Bits {
  const A* first;
  int64_t row, offset;  // elements from a passing row, and from an offset, to the next
  const A* at(int64_t i, int64_t o) const { return first + i * row + o * offset; }
};

// Bits for all offsets of each vector of a folded row, which are those of every such row; of others one that is set.
template <class A>
inline int64_t across_size(const VeuTiles<A>& t) {
  return t.fold > 1 ? t.width * (2 * t.R[2] + 1) : kLanes<A>;
}
template <class A>
inline void fill_across(const VeuTiles<A>& t, A* bits) {
  if (t.fold == 1) return fill(bits, kLanes<A>, all_bits<A>());
  for (int64_t x = 0; x < t.width; x += kLanes<A>)
    for (int64_t o = -t.R[2]; o <= t.R[2]; o++)
      for (int64_t i = 0; i < kLanes<A>; i++) {
        const int64_t seen = (x + i) % t.W + o;
        *bits++ = seen >= 0 && seen < t.W ? all_bits<A>() : A(0);
      }
}
template <class A>
inline Bits<A> bits_across(const VeuTiles<A>& t, const A* across, int64_t x, int64_t o) {
  if (t.fold == 1) return {across, 0, 0};
  return {across + x * (2 * t.R[2] + 1) + (o + t.R[2]) * kLanes<A>, 0, kLanes<A>};
}

// Bits of key rows at offset o of the vector at x.
template <class A>
inline Bits<A> bits_of_keys(const VeuTiles<A>& t, const A* across, const A* keys, int64_t x, int64_t o) {
  if (t.fold > 1) return bits_across(t, across, x, o);
  return {keys + (t.words + 1) * t.halo + t.left + x + o, (t.words + 2) * t.halo, 1};
}

// Key rows (z, y..), n of them, into what `clear_keys` prepared. Keys that do not take part are zero, so that nothing
// they hold (a NaN, say) reaches the sums.
template <class A>
inline void load_keys(const VeuTiles<A>& t, const Inside& in, int64_t b, int64_t j, int64_t z, int64_t y, int64_t n,
                      A* keys) {
  const Veu& a = t.a;
  const int64_t row = (t.words + 2) * t.halo;
  load_features(t, a.k, b, j, z, y, in.x0, n, in.end - in.begin, A(1), keys + in.begin, t.halo, row);
  for (int64_t y1 = 0; a.mask && y1 < n; y1++) {
    const bool* mask = a.mask + at(t, b, 1, 0, z, y + y1, in.x0);
    A *key = keys + y1 * row, *part = key + (t.words + 1) * t.halo;
    for (int64_t i = in.begin; i < in.end; i++) {
      part[i] = mask[i - in.begin] ? all_bits<A>() : A(0);
      for (int64_t c = 0; !mask[i - in.begin] && c <= t.words; c++) key[c * t.halo + i] = 0;
    }
  }
}

// sum + a b of numbers, or the two products of pairs.
template <class A>
COVER_INLINE Vec<A> add_product(Vec<A> sum, Vec<A> a, Vec<A> b) {
#ifdef COVER_PAIRS
  return (Vec<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + a * b;
#endif
}

// One word of the dot products of R rows of a tile with G neighbours of a passing row, of which the first is F away
// from k: s[r][g] += q[r] * k[. + F + g], or, with kFirst, the first of these summands.
template <int R, int F, int G, bool kFirst, class A>
COVER_INLINE void add_channel(const A* q, int64_t q_row, const A* k, Vec<A> (*s)[G]) {
  Vec<A> query[R];
  unroll<R>([&](auto r) COVER_INLINE_LAMBDA { query[r] = load_once(q + r * q_row); });
  unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
    const Vec<A> key = load_once(k + F + g);
    unroll<R>([&](auto r) COVER_INLINE_LAMBDA {
      if constexpr (kFirst && !kPairs)
        s[r][g] = query[r] * key;
      else
        s[r][g] = add_product<A>(kFirst ? Vec<A>{} : s[r][g], query[r], key);
    });
  });
}

// Adds words c.. to dot products: s[r][g] += sum_c q[r][c] * k[c][. + F + g]. Row r of the tile has a passing row of
// its own, r * apart away, unless that is 0.
template <int R, int F, int G, class A>
COVER_INLINE void dot(int64_t c, int64_t words, const A* q, int64_t q_row, int64_t q_stride, const A* k,
                      int64_t k_stride, int64_t apart, Vec<A> (*s)[G]) {
  for (; c < words; c++) {
    Vec<A> query[R];
    unroll<R>([&](auto r) COVER_INLINE_LAMBDA { query[r] = load_once(q + r * q_row + c * q_stride); });
    if (apart == 0)
      unroll<G>([&](auto g) COVER_INLINE_LAMBDA {
        const Vec<A> key = load_beside<F + g>(k + c * k_stride);
        unroll<R>([&](auto r) COVER_INLINE_LAMBDA { s[r][g] = add_product<A>(s[r][g], query[r], key); });
      });
    else
      unroll<R * G>([&](auto i) COVER_INLINE_LAMBDA {
        const Vec<A> key = load_beside<F + i % G>(k + i / G * apart + c * k_stride);
        s[i / G][i % G] = add_product<A>(s[i / G][i % G], query[i / G], key);
      });
  }
}

// Whether scores are within kBound, given the largest squared lengths of a query and a key (Cauchy-Schwarz).
template <class A>
inline bool bounded(const VeuTiles<A>& t, A query, A key) {
  return query * key * (t.in_products * t.in_products) <= static_cast<A>(kBound * kBound);
}

// The largest of what the windows of the vector at x of a tile see in one channel of n padded rows, `row` apart; 0 if
// it is below 0. A NaN does not count: whatever bounds it, all that comes of it is NaN.
template <class A>
inline A largest_seen(const VeuTiles<A>& t, const A* first, int64_t row, int64_t n, int64_t x) {
  Vec<A> most{};
  for (int64_t i = 0; i < n; i++) {
    const A *p = first + i * row + t.left + x - t.R[2], *last = p + 2 * t.R[2];
    most = larger(load(last), most);
    for (; p < last; p += kLanes<A>) most = larger(load(p), most);
  }
  return largest<A>(most);
}

// The largest squared length of the features of a tile, as `load_tile` leaves them.
template <class A>
inline A longest_in_tile(const VeuTiles<A>& t, const VeuTile<A>& tile, const A* features) {
  Vec<A> most{};
  for (int64_t i = 0; i < tile.nz; i++)
    for (int64_t k = 0; k < tile.ny; k++)
      for (int64_t x = 0; x < tile.nx; x += kLanes<A>)
        most = larger(load(features + ((i * t.rows + k) * (t.words + 1) + t.words) * t.width + x), most);
  return largest<A>(most);
}

// Cuts the offsets -R..R into chunks and calls f(o, G) for each: G of them, a constant, of which the one with (G - 1) /
// 2 before it is o.
template <class F>
inline void for_chunks(int64_t R, const F& f) {
  int64_t first = -R;
  const auto chunk = [&](auto G) {
    f(first + (G - 1) / 2, G);
    first += G;
  };
  while (R + 1 - first >= kChunk) chunk(std::integral_constant<int, kChunk>());
  switch (R + 1 - first) {
    case 1: return chunk(std::integral_constant<int, 1>());
    case 3: return chunk(std::integral_constant<int, 3>());
    case 5: return chunk(std::integral_constant<int, 5>());
    case 7: return chunk(std::integral_constant<int, 7>());
  }
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

}  // namespace COVER_ISA
}  // namespace cover
