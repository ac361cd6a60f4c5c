// VEU on the CPU: key rows pass a tile of query rows (veu_tiles.h).
//
// At one vector of voxels, two query rows keep their scores along W in registers. Scores are in base 2, with
// scale * log2(e) folded into the queries. Where lengths of queries and keys bound them, as they nearly always do, the
// softmax needs no maximum, and exponentials are computed between the multiply-adds of the next scores; else it is an
// online one. Only the sum and the innermost moment are accumulated per key: the outer moments are the row's sum times
// a constant. Nothing of size N^d exists anywhere. docs/performance.md counts what it costs.
namespace cover {
namespace COVER_ISA {

constexpr double kSlack = 64;  // by as much scores may exceed what stands for their maximum, in powers of 2
// Up to this, exponentials are computed between multiply-adds, given the registers.
constexpr int64_t kFewChannels = COVER_REGISTERS >= 32 ? 16 : 0;

// Softmax of a tile's rows: what is subtracted from scores (0, or a score that was the maximum once), sum of the
// weights and their moments along the three axes, each [planes, rows, width].
template <class A>
struct Softmax {
  A *top, *sum, *moment[3];
  Softmax at(int64_t i) const { return {top + i, sum + i, {moment[0] + i, moment[1] + i, moment[2] + i}}; }
};

// What a block of key rows adds to it at one vector of voxels: the sum, and the moments along H, about the query, and
// along W, about the middle of the offsets.
template <class A>
struct Sums {
  Vec<A> sum{}, along_y{}, along_x{};
};

// Adds the weights of n offsets from the first on, of G, in a key row y away.
template <int first, int n, int G, class A>
COVER_INLINE void add_weights(const Vec<A>* w, A y, Sums<A>& sums) {
  constexpr double middle = (G - 1) / 2.0;
  Vec<A> total = w[0], moment = w[0] * static_cast<A>(first - middle);
  unroll<n - 1>([&](auto i) COVER_INLINE_LAMBDA {
    total += w[i + 1];
    if constexpr (first + i + 1 != middle) moment += w[i + 1] * static_cast<A>(first + i + 1 - middle);
  });
  sums.sum += total;
  sums.along_x += moment;
  sums.along_y += total * y;
}

// Adds a block's sums to a row's softmax, each times a factor.
template <class A, class Factor>
COVER_INLINE void add_sums(const Softmax<A>& state, Factor decay, const Sums<A>& sums, Factor weight, A middle, A oz) {
  const auto add = [&](A* to, Vec<A> value) COVER_INLINE_LAMBDA { store(to, load(to) * decay + value * weight); };
  add(state.sum, sums.sum);
  add(state.moment[2], sums.along_x + sums.sum * middle);
  add(state.moment[1], sums.along_y);
  add(state.moment[0], sums.sum * oz);
}

// 2^score of products, within kBound.
template <class A>
COVER_INLINE Vec<A> weight(Vec<A> products, A in_products) {
  return exp2_within(kPairs ? products * in_products : products);
}

// Dot products with G neighbours while n earlier ones turn into weights. Exponentials occupy other units of a processor
// than multiply-adds, but it does not look far enough ahead to find that out by itself.
template <int R, int F, int G, int n, class A>
COVER_INLINE void dot_and_exp2(int64_t words, const A* q, int64_t q_row, int64_t q_stride, const A* k, int64_t k_stride,
                               Vec<A> (*s)[G], A in_products, Vec<A> (*earlier)[n]) {
  unroll<R * n>([&](auto i) COVER_INLINE_LAMBDA {
    if constexpr (i == 0)
      add_channel<R, F, G, true>(q, q_row, k, s);
    else if (i < words)
      add_channel<R, F, G, false>(q + i * q_stride, q_row, k + i * k_stride, s);
    Vec<A>& x = earlier[i % R][i / R];
    x = weight<A>(x, in_products);
  });
  dot<R, F, G>(R * n, words, q, q_row, q_stride, k, k_stride, 0, s);
}

// Key rows begin..end - 1 of a block against R query rows, oy away from the first; the second query row sees others,
// `apart` of them on, unless that is 0. kBits: `bits.offset`, or 0 where all keys take part.
template <int R, int G, int kBits, class A>
COVER_INLINE void bounded_rows(const VeuTiles<A>& t, const A* q, const A* keys, int64_t begin, int64_t end,
                               const Bits<A>& bits, int64_t apart, const int64_t* oy, Sums<A>* sums) {
  if (begin >= end) return;
  constexpr int G1 = (G + 1) / 2, G2 = G / 2, F = -((G - 1) / 2);  // two halves; the first offset
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, G1>;
  const int64_t words = t.words, q_row = (words + 1) * t.width, row = (words + 2) * t.halo;
  keys += begin * row;
  const auto to_weights = [&](auto& s) COVER_INLINE_LAMBDA {
    unroll<R>([&](auto r) COVER_INLINE_LAMBDA {
      for (auto& x : s[r]) x = weight<A>(x, t.in_products);
    });
  };
  // adds weights of key row i, which `keys` points at, from offset F + first on
  const auto add = [&](auto first, auto& w, int64_t i) COVER_INLINE_LAMBDA {
    constexpr int n = sizeof(w[0]) / sizeof(w[0][0]);
    unroll<R>([&](auto r) COVER_INLINE_LAMBDA {
      const A* part = bits.first + (i + r * apart) * bits.row + (F + first) * kBits;
      unroll<kBits ? n : 0>([&](auto g) COVER_INLINE_LAMBDA { w[r][g] = where_set(w[r][g], part + g * kBits); });
      add_weights<first, n, G>(w[r], static_cast<A>(oy[r] + i + r * apart), sums[r]);
    });
  };
  if (G2 == 0 || words > kFewChannels || apart != 0) {
    for (int64_t i = begin; i < end; i++, keys += row) {
      Vec<A> s[R][G] = {};
      dot<R, F, G>(0, words, q, q_row, t.width, keys, t.halo, apart * row, s);
      to_weights(s);
      add(First(), s, i);
    }
  } else if constexpr (G2 > 0) {
    Vec<A> s1[R][G1] = {}, s2[R][G2];
    dot<R, F, G1>(0, words, q, q_row, t.width, keys, t.halo, 0, s1);
    for (int64_t i = begin; i < end; i++, keys += row) {
      dot_and_exp2<R, F + G1>(words, q, q_row, t.width, keys, t.halo, s2, t.in_products, s1);
      add(First(), s1, i);
      if (i + 1 < end)
        dot_and_exp2<R, F>(words, q, q_row, t.width, keys + row, t.halo, s1, t.in_products, s2);
      else
        to_weights(s2);
      add(Second(), s2, i);
    }
  }
}

// Calls f(kBits).
template <class A, class F>
COVER_INLINE void with_bits(bool masked, bool folded, const F& f) {
  if (!masked)
    f(std::integral_constant<int, 0>());
  else
    folded ? f(std::integral_constant<int, kLanes<A>>()) : f(std::integral_constant<int, 1>());
}

// A block of key rows against kRows query rows: G offsets, of which the middle one is `middle`. No score is beyond
// kBound, so that 0 stands for the maximum. q, keys and state point at the vector of voxels and the chunk's offset.
template <int G, int kBits, class A>
__attribute__((noinline)) void forward_rows(const VeuTiles<A>& t, const A* q, const A* keys, const Bits<A>& bits,
                                            const Passing& block, A middle, const Softmax<A>& state) {
  Sums<A> sums[kRows];
  const Reach(&seen)[kRows] = block.seen;
  if constexpr (kRows == 1) {
    bounded_rows<1, G, kBits>(t, q, keys, seen[0].first, seen[0].last, bits, 0, block.oy, sums);
  } else {
    const int64_t begin = seen[1].first, end = seen[0].last;  // of what both see
    const A* second = q + (t.words + 1) * t.width;
    bounded_rows<2, G, kBits>(t, q, keys, begin, end, bits, 0, block.oy, sums);
    // as many that only the first sees as those that only the second sees: nearly always
    if (begin < end && begin - seen[0].first == seen[1].last - end) {
      bounded_rows<2, G, kBits>(t, q, keys, seen[0].first, begin, bits, end - seen[0].first, block.oy, sums);
    } else {
      bounded_rows<1, G, kBits>(t, q, keys, seen[0].first, min(begin, end), bits, 0, block.oy, sums);
      bounded_rows<1, G, kBits>(t, second, keys, max(begin, end), seen[1].last, bits, 0, block.oy + 1, sums + 1);
    }
  }
  unroll<kRows>([&](auto r) COVER_INLINE_LAMBDA {
    if (seen[r].first >= seen[r].last) return;
    const Softmax<A> own = state.at(r * t.width);
    const Vec<A> top = load(own.top);
    if (__builtin_expect(any(top != A(0)), 0)) {
      const Vec<A> now = larger(top, Vec<A>{});
      store(own.top, now);
      add_sums(own, exp2(top - now), sums[r], exp2(-now), middle, static_cast<A>(block.oz));
    } else {
      add_sums(own, A(1), sums[r], A(1), middle, static_cast<A>(block.oz));
    }
  });
}

// A block of key rows against one query row, whatever the scores. What stands for the maximum is raised where a score
// exceeds it by more than kSlack.
template <int G, class A>
__attribute__((noinline)) void general_rows(const VeuTiles<A>& t, const A* q, const A* keys, const Bits<A>& bits,
                                            Reach seen, int64_t oz, int64_t oy, A middle, const Softmax<A>& state) {
  constexpr int F = -((G - 1) / 2);
  const int64_t words = t.words;
  const Vec<A> before = load(state.top), zero{}, one = splat(A(1)), none = splat(-kInf<A>);
  Vec<A> top = before, limit = load(state.sum) == A(0) ? none : splat(static_cast<A>(kSlack));
  Sums<A> sums;
  // what sums of weights are worth from `now` on; there are none if it is lower
  const auto decay = [&](Vec<A> from, Vec<A> now) { return exp2(from > now ? zero : from - now); };
  for (int64_t i = seen.first; i < seen.last; i++) {
    const A* row = keys + i * (words + 2) * t.halo;
    Vec<A> s[1][G] = {}, peak = none;
    dot<1, F, G>(0, words, q, 0, t.width, row, t.halo, 0, s);
    for (int g = 0; g < G; g++) {
      if (kPairs) s[0][g] *= t.in_products;
      s[0][g] = where_set(one, bits.at(i, F + g)) == A(0) ? none : s[0][g];
      peak = larger(s[0][g], peak);
    }
    const auto raised = peak - top > limit;
    if (any(raised)) {
      const Vec<A> now = raised ? peak : top, by = decay(top, now);
      top = now;
      limit = raised ? splat(static_cast<A>(kSlack)) : limit;
      sums = {sums.sum * by, sums.along_y * by, sums.along_x * by};
    }
    for (int g = 0; g < G; g++) s[0][g] = exp2(s[0][g] - top);
    add_weights<0, G, G>(s[0], static_cast<A>(oy + i), sums);
  }
  store(state.top, top);
  add_sums(state, decay(before, top), sums, one, middle, static_cast<A>(oz));
}

template <class A>
struct ForwardBuffers {
  A *q, *keys, *state, *out, *across;
  int64_t cleared = -1;  // the column whose tiles `keys` is prepared for

  static int64_t size(const VeuTiles<A>& t) {
    return (t.words + 4) * t.tile_size() + 5 * t.padded_size() + t.passing * (t.words + 2) * t.halo + across_size(t);
  }
  ForwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : q(scratch.take((t.words + 1) * t.tile_size())),
        keys(scratch.take(t.passing * (t.words + 2) * t.halo)),
        state(scratch.take(5 * t.padded_size())),
        out(scratch.take(3 * t.tile_size())),
        across(scratch.take(across_size(t))) {
    fill_across(t, across);
  }
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
  for (int64_t j = 0; j < a.J; j += t.fold) {
    load_tile(t, tile, a.q, b, j, t.in_queries, s.q);
    const A longest_query = longest_in_tile(t, tile, s.q);
    fill(s.state, 5 * padded, A(0));
    A* const p = s.state;
    const Softmax<A> state{p, p + padded, {p + 2 * padded, p + 3 * padded, p + 4 * padded}};
    for_passing_rows(t, tile, [&](int64_t z, int64_t y, int64_t n) {
      load_keys(t, in, b, j, z, y, n, s.keys);
      for (int64_t x = 0; x < tile.nx; x += kLanes<A>) {
        const bool masked = sees_masked(t, tile, x);
        const A longest_key = largest_seen(t, s.keys + t.words * t.halo, (t.words + 2) * t.halo, n, x);
        const bool safe = bounded(t, longest_query, longest_key);
        for_row_pairs(t, tile, z, y, n, [&](int64_t row, const Passing& block) {
          for_chunks(t.R[2], [&](int64_t o, auto G) {
            const A *q = s.q + row * (t.words + 1) * t.width + x, *keys = s.keys + t.left + x + o;
            const Bits<A> bits = bits_of_keys(t, s.across, s.keys, x, o);
            const A middle = static_cast<A>(o + (G % 2 ? 0 : 0.5));
            const Softmax<A> own = state.at(row * t.width + x);
            for (int r = 0; !safe && r < kRows; r++)
              general_rows<G>(t, q + r * (t.words + 1) * t.width, keys, bits, block.seen[r], block.oz, block.oy[r],
                              middle, own.at(r * t.width));
            if (safe)
              with_bits<A>(masked, t.fold > 1,
                           [&](auto kind) { forward_rows<G, kind>(t, q, keys, bits, block, middle, own); });
          });
        });
      }
    });
    tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
      const Softmax<A> m = state.at(row * t.width);
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
      for_groups(t, tile.nx, [&](int64_t group, int64_t first, int64_t n) {
        std::memcpy(static_cast<A*>(a.lse) + at(t, b, a.J, j + group, z, y, tile.x), m.top + first, n * sizeof(A));
      });
    });
  }
  for (int64_t i = 0; i < a.d; i++)
    tile.for_rows(t, [&](int64_t z, int64_t y, int64_t row) {
      A* v = static_cast<A*>(a.v) + at(t, b, a.d, i, z, y, tile.x);
      const A* out = s.out + (3 - a.d + i) * size + row * t.width;
      for_groups(t, tile.nx, [&](int64_t group, int64_t first, int64_t n) {
        for (int64_t x = 0; x < n; x++) v[x] = (group ? v[x] : A(0)) + out[first + x];
      });
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
