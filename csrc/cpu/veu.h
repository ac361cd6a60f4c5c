// VEU on the CPU: lanes are neighbouring voxels along W, and key rows stream past a tile of query rows.
//
// A tile is `rows` voxel rows by `width` voxels of one (batch, z). Every key row that some query of the tile sees is
// copied once into a zero-padded buffer with its halo (which also converts the storage type) and used by all query
// rows within reach. For one (query row, key row) pair the N scores along W stay in registers; the softmax is online
// in base 2, with scale * log2(e) folded into the queries. Only the sum and the innermost moment are accumulated per
// key: the outer moments are the row's sum times a constant. Nothing of size N^d exists anywhere.
namespace cover {
namespace COVER_ISA {

constexpr int kChunk = 8;  // scores of a row that are in registers at once; wider windows take several chunks
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The geometry of a VEU call: how it is cut into tiles.
template <class A>
struct VeuTiles {
  const Veu& a;
  int64_t D, H, W, R[3];  // R: the window's radii
  int64_t rows, width;    // of a tile; width is a multiple of the lanes
  int64_t halo;           // width of a padded row: width + 2 R[2]
  int64_t ny, nx, n;      // tiles along H, along W, and per (batch or group)

  explicit VeuTiles(const Veu& a) : a(a), D(a.S[0]), H(a.S[1]), W(a.S[2]) {
    // a window wider than the image sees no more than one as wide as the image
    for (int i = 0; i < 3; i++) R[i] = min((a.N[i] - 1) / 2, a.S[i] - 1);
    const int64_t lanes = kLanes<A>;
    // half of a small second-level cache for the tile's queries: 32768 floats
    rows = min<int64_t>(H, 8);
    while (rows > 1 && a.C * rows * lanes > 32768) rows /= 2;
    width = max(lanes, min(round_up(W, lanes), 32768 / (a.C * rows) / lanes * lanes));
    halo = width + 2 * R[2];
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

// The rows y of a tile whose window reaches row `other`: [first, last).
template <class A>
inline int64_t first_row(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t other) {
  return max<int64_t>(0, other - t.R[1] - tile.y);
}
template <class A>
inline int64_t last_row(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t other) {
  return min(tile.ny, other + t.R[1] - tile.y + 1);
}

// Queries (or keys) of a tile's rows in group j: dst [rows, C, width], zero beyond the image.
template <class A>
inline void load_tile(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t b, int64_t j, A factor,
                      A* dst) {
  const Veu& a = t.a;
  fill(dst, t.rows * a.C * t.width, A(0));
  for (int64_t y = 0; y < tile.ny; y++)
    for (int64_t c = 0; c < a.C; c++)
      load_row(a.dtype, src, at(t, b, a.J * a.C, j * a.C + c, tile.z, tile.y + y, tile.x), tile.nx, factor,
               dst + (y * a.C + c) * t.width);
}

// The part of a padded row that lies inside the image: dst[begin..end) holds voxels x0..
struct Inside {
  int64_t begin, end, x0;
};
template <class A>
inline Inside inside_row(const VeuTiles<A>& t, const VeuTile<A>& tile) {
  const int64_t first = tile.x - t.R[2];
  const int64_t begin = max<int64_t>(0, -first), end = max(begin, min(t.halo, t.W - first));
  return {begin, end, first + begin};
}

// One row of an acc tensor [.., *S] with its halo, `outside` beyond the image.
template <class A>
inline void load_halo(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t row, A outside, A* dst) {
  const Inside in = inside_row(t, tile);
  fill(dst, t.halo, outside);
  std::memcpy(dst + in.begin, static_cast<const A*>(src) + row + in.x0, (in.end - in.begin) * sizeof(A));
}

// Feature row (z, y) of group j with its halo: dst [C, halo], zero beyond the image.
template <class A>
inline void load_features(const VeuTiles<A>& t, const VeuTile<A>& tile, const void* src, int64_t b, int64_t j,
                          int64_t z, int64_t y, A factor, A* dst) {
  const Veu& a = t.a;
  const Inside in = inside_row(t, tile);
  for (int64_t c = 0; c < a.C; c++) {
    fill(dst + c * t.halo, t.halo, A(0));
    load_row(a.dtype, src, at(t, b, a.J * a.C, j * a.C + c, z, y, in.x0), in.end - in.begin, factor,
             dst + c * t.halo + in.begin);
  }
}

// Key row with its halo: features [C, halo], and bias [halo]: 0 where a key takes part, -inf elsewhere. Keys that do
// not take part are zero, so that nothing they hold (a NaN, say) reaches the sums.
template <class A>
inline void load_keys(const VeuTiles<A>& t, const VeuTile<A>& tile, int64_t b, int64_t j, int64_t z, int64_t y, A* keys,
                      A* bias) {
  const Veu& a = t.a;
  const Inside in = inside_row(t, tile);
  load_features(t, tile, a.k, b, j, z, y, A(1), keys);
  fill(bias, t.halo, -kInf<A>);
  fill(bias + in.begin, in.end - in.begin, A(0));
  if (!a.mask) return;
  const bool* mask = a.mask + at(t, b, 1, 0, z, y, in.x0);
  for (int64_t i = in.begin; i < in.end; i++) {
    if (mask[i - in.begin]) continue;
    bias[i] = -kInf<A>;
    for (int64_t c = 0; c < a.C; c++) keys[c * t.halo + i] = 0;
  }
}

// Dot products of R query rows with G neighbouring keys: s[r][g] += sum_c q[r][c] * k[c][. + g]
template <class A, int R, int G>
inline void dot(int64_t C, const A* const* q, int64_t q_stride, const A* k, int64_t k_stride, Vec<A> (&s)[R][G]) {
  for (int64_t c = 0; c < C; c++) {
    Vec<A> query[R];
    for (int r = 0; r < R; r++) query[r] = load(q[r] + c * q_stride);
    for (int g = 0; g < G; g++) {
      const Vec<A> key = load(k + c * k_stride + g);
      for (int r = 0; r < R; r++) s[r][g] += query[r] * key;
    }
  }
}

// Calls f with the number of scores of a chunk as a compile-time constant.
template <class F>
inline void with_chunk(int64_t n, const F& f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, kChunk>());
  }
}

// Calls f(first offset index, chunk size constant) for the chunks of a row of n offsets.
template <class F>
inline void for_chunks(int64_t n, const F& f) {
  for (int64_t o = 0; o < n; o += kChunk) with_chunk(n - o, [&](auto G) { f(o, G); });
}

// Online softmax of one tile row: maximum, sum and moments along the three axes, each [width].
template <class A>
struct Softmax {
  A *max, *sum, *moment[3];
};

// One key row against R query rows, q[r] [C, width], at offsets oy[r] along H and oz along D.
template <class A, int R>
inline void forward_rows(const VeuTiles<A>& t, const A* const* q, const A* keys, const A* bias, int64_t oz,
                         const int64_t* oy, const Softmax<A>* state) {
  for (int64_t x = 0; x < t.width; x += kLanes<A>) {
    for_chunks(2 * t.R[2] + 1, [&](int64_t o, auto G) {
      Vec<A> s[R][G];
      for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) s[r][g] = load(bias + x + o + g);
      const A* query[R];
      for (int r = 0; r < R; r++) query[r] = q[r] + x;
      dot<A, R, G>(t.a.C, query, t.width, keys + x + o, t.halo, s);
      for (int r = 0; r < R; r++) {
        const Softmax<A>& m = state[r];
        const Vec<A> before = load(m.max + x);
        Vec<A> top = before;
        for (int g = 0; g < G; g++) top = s[r][g] > top ? s[r][g] : top;
        Vec<A> sum{}, moment{};
        for (int g = 0; g < G; g++) {
          const Vec<A> w = exp2(s[r][g] - top);
          sum += w;
          moment += w * static_cast<A>(o + g - t.R[2]);
        }
        const Vec<A> decay = exp2(before - top);
        store(m.max + x, top);
        store(m.sum + x, load(m.sum + x) * decay + sum);
        store(m.moment[2] + x, load(m.moment[2] + x) * decay + moment);
        store(m.moment[1] + x, load(m.moment[1] + x) * decay + sum * static_cast<A>(oy[r]));
        if (t.D > 1) store(m.moment[0] + x, load(m.moment[0] + x) * decay + sum * static_cast<A>(oz));
      }
    });
  }
}

template <class A>
struct ForwardBuffers {
  A *q, *keys, *bias, *state, *out;

  static int64_t size(const VeuTiles<A>& t) {
    return t.rows * t.a.C * t.width + (t.a.C + 1) * t.halo + 8 * t.rows * t.width;
  }
  ForwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : q(scratch.take(t.rows * t.a.C * t.width)),
        keys(scratch.take(t.a.C * t.halo)),
        bias(scratch.take(t.halo)),
        state(scratch.take(5 * t.rows * t.width)),
        out(scratch.take(3 * t.rows * t.width)) {}
};

// v and lse of one tile; `out` [3, rows, width] sums the groups.
template <class A>
inline void forward_tile(const VeuTiles<A>& t, int64_t b, const VeuTile<A>& tile, const ForwardBuffers<A>& s) {
  const Veu& a = t.a;
  const int64_t plane = t.rows * t.width;
  fill(s.out, 3 * plane, A(0));
  for (int64_t j = 0; j < a.J; j++) {
    load_tile(t, tile, a.q, b, j, static_cast<A>(a.scale * kLog2e), s.q);
    // finite, so that -inf - max is never NaN
    fill(s.state, plane, std::numeric_limits<A>::lowest() / 2);
    fill(s.state + plane, 4 * plane, A(0));
    const auto row_state = [&](int64_t y) {
      A* p = s.state + y * t.width;
      return Softmax<A>{p, p + plane, {p + 2 * plane, p + 3 * plane, p + 4 * plane}};
    };
    for (int64_t z = max<int64_t>(0, tile.z - t.R[0]); z <= min(t.D - 1, tile.z + t.R[0]); z++) {
      const int64_t last = min(t.H - 1, tile.y + tile.ny - 1 + t.R[1]);
      for (int64_t y = max<int64_t>(0, tile.y - t.R[1]); y <= last; y++) {
        load_keys(t, tile, b, j, z, y, s.keys, s.bias);
        int64_t row = first_row(t, tile, y);
        const int64_t end = last_row(t, tile, y);
        const auto rows = [&](auto R) {
          const A* q[R];
          int64_t oy[R];
          Softmax<A> state[R];
          for (int r = 0; r < R; r++) {
            q[r] = s.q + (row + r) * a.C * t.width;
            oy[r] = y - tile.y - row - r;
            state[r] = row_state(row + r);
          }
          forward_rows<A, R>(t, q, s.keys, s.bias, z - tile.z, oy, state);
          row += R;
        };
        // two query rows share each load of a key where there are registers for both
        if (COVER_REGISTERS >= 32)
          while (row + 1 < end) rows(std::integral_constant<int, 2>());
        while (row < end) rows(std::integral_constant<int, 1>());
      }
    }
    for (int64_t y = 0; y < tile.ny; y++) {
      const Softmax<A> m = row_state(y);
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
