// Backward of VEU on the CPU (derivation: docs/derivations.md), in two gathers, so that no two threads ever add to
// the same place and the result does not depend on their number.
//
// With D = <g, v>, which needs only the saved output, and weights w recomputed from the saved log-sum-exp:
//   queries:  t(o) = w(o) (<g, o> - D),  A = sum t(o) k(p + o),  grad_q = (A - excess * sum w(o) k(p + o)) scale / J,
//             excess = sum t(o), which is delta_j - D and vanishes when there is one group;
//   keys:     grad_k(p') = sum w (<g, o> - delta_j) q(p' - o) scale / J, delta_j = D + excess of the query.
// The excess of a query reaches the keys through a ring buffer over tiles, a few MB whatever the image.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kRingElements = 1 << 20;  // of the excess, unless one window-deep slab of one group needs more

template <class A>
struct BackwardBuffers {
  A *center, *rows, *bias, *sum, *weighted, *grad[3], *inner, *lse, *excess, *base;

  static int64_t size(const VeuTiles<A>& t) {
    return 3 * t.rows * t.a.C * t.width + (t.a.C + 2) * t.halo + 6 * max(t.rows * t.width, t.halo);
  }
  BackwardBuffers(const VeuTiles<A>& t, Scratch<A>& scratch)
      : center(scratch.take(t.rows * t.a.C * t.width)),    // queries or keys of the tile
        rows(scratch.take(t.a.C * t.halo)),                // keys or queries of a passing row
        bias(scratch.take(t.halo)),                        // of a passing key row
        sum(scratch.take(t.rows * t.a.C * t.width)),       // sum t k, or the sum of grad_k
        weighted(scratch.take(t.rows * t.a.C * t.width)),  // sum w k
        // g, <g, v>, log-sum-exp and excess: of the tile's rows, or of a passing row with its halo
        grad{scratch.take(max(t.rows * t.width, t.halo)), scratch.take(max(t.rows * t.width, t.halo)),
             scratch.take(max(t.rows * t.width, t.halo))},
        inner(scratch.take(max(t.rows * t.width, t.halo))),
        lse(scratch.take(max(t.rows * t.width, t.halo))),
        excess(scratch.take(max(t.rows * t.width, t.halo))),
        base(scratch.take(t.halo)) {}
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

// One key row against one query row of a tile: adds to sum, weighted [C, width] and excess [width].
// base [width] is g_z oz + g_y oy - D.
template <class A>
inline void query_rows(const VeuTiles<A>& t, const A* q, const A* keys, const A* bias, const A* base, const A* gx,
                       const A* lse, A* sum, A* weighted, A* excess) {
  const int64_t C = t.a.C;
  const bool groups = t.a.J > 1;
  for (int64_t x = 0; x < t.width; x += kLanes<A>) {
    for_chunks(2 * t.R[2] + 1, [&](int64_t o, auto G) {
      Vec<A> s[1][G], w[G];
      for (int g = 0; g < G; g++) s[0][g] = load(bias + x + o + g);
      const A* query[1] = {q + x};
      dot<A, 1, G>(C, query, t.width, keys + x + o, t.halo, s);
      const Vec<A> top = load(lse + x), b = load(base + x), g_x = load(gx + x);
      Vec<A> total = load(excess + x);
      for (int g = 0; g < G; g++) {
        w[g] = exp2(s[0][g] - top);
        s[0][g] = w[g] * (b + g_x * static_cast<A>(o + g - t.R[2]));
        total += s[0][g];
      }
      store(excess + x, total);
      for (int64_t c = 0; c < C; c++) {
        const A* key = keys + c * t.halo + x + o;
        Vec<A> to = load(sum + c * t.width + x);
        for (int g = 0; g < G; g++) to += s[0][g] * load(key + g);
        store(sum + c * t.width + x, to);
        if (!groups) continue;
        Vec<A> plain = load(weighted + c * t.width + x);
        for (int g = 0; g < G; g++) plain += w[g] * load(key + g);
        store(weighted + c * t.width + x, plain);
      }
    });
  }
}

// One query row with its halo against one key row of a tile: adds to sum [C, width].
// base [halo] is g_z oz + g_y oy - delta_j. The query at lane x + i lies at offset R - i from the key.
template <class A>
inline void key_rows(const VeuTiles<A>& t, const A* k, const A* queries, const A* base, const A* gx, const A* lse,
                     A* sum) {
  const int64_t C = t.a.C;
  for (int64_t x = 0; x < t.width; x += kLanes<A>) {
    for_chunks(2 * t.R[2] + 1, [&](int64_t i, auto G) {
      Vec<A> s[1][G] = {};
      const A* key[1] = {k + x};
      dot<A, 1, G>(C, key, t.width, queries + x + i, t.halo, s);
      for (int g = 0; g < G; g++) {
        const int64_t at = x + i + g;
        const Vec<A> offset = load(base + at) + load(gx + at) * static_cast<A>(t.R[2] - i - g);
        s[0][g] = exp2(s[0][g] - load(lse + at)) * offset;
      }
      for (int64_t c = 0; c < C; c++) {
        const A* query = queries + c * t.halo + x + i;
        Vec<A> to = load(sum + c * t.width + x);
        for (int g = 0; g < G; g++) to += s[0][g] * load(query + g);
        store(sum + c * t.width + x, to);
      }
    });
  }
}

// grad_q of one tile in group j; leaves the excess of its queries in `ring` [rows, width].
template <class A>
inline void grad_queries(const VeuTiles<A>& t, int64_t b, int64_t j, const VeuTile<A>& tile,
                         const BackwardBuffers<A>& s, A* ring) {
  const Veu& a = t.a;
  const int64_t plane = t.rows * t.width;
  load_tile(t, tile, a.q, b, j, static_cast<A>(a.scale * kLog2e), s.center);
  const auto load_plane = [&](const void* src, int64_t channels, int64_t c, A outside, A* dst) {
    fill(dst, plane, outside);
    for (int64_t y = 0; y < tile.ny; y++)
      std::memcpy(dst + y * t.width, static_cast<const A*>(src) + at(t, b, channels, c, tile.z, tile.y + y, tile.x),
                  tile.nx * sizeof(A));
  };
  fill(s.grad[0], plane, A(0));
  for (int64_t i = 0; i < a.d; i++) load_plane(a.grad_v, a.d, i, A(0), s.grad[3 - a.d + i]);
  load_inner(t, s.grad, plane, s.excess, s.inner, [&](int64_t i, A* v) { load_plane(a.v, a.d, i, A(0), v); });
  load_plane(a.lse, a.J, j, -kInf<A>, s.lse);
  lse_to_base2(s.lse, plane);
  fill(s.excess, plane, A(0));
  fill(s.sum, t.rows * a.C * t.width, A(0));
  fill(s.weighted, t.rows * a.C * t.width, A(0));
  for (int64_t z = max<int64_t>(0, tile.z - t.R[0]); z <= min(t.D - 1, tile.z + t.R[0]); z++) {
    const int64_t last = min(t.H - 1, tile.y + tile.ny - 1 + t.R[1]);
    for (int64_t y = max<int64_t>(0, tile.y - t.R[1]); y <= last; y++) {
      load_keys(t, tile, b, j, z, y, s.rows, s.bias);
      for (int64_t row = first_row(t, tile, y); row < last_row(t, tile, y); row++) {
        const int64_t at_row = row * t.width, oz = z - tile.z, oy = y - tile.y - row;
        for (int64_t x = 0; x < t.width; x++)
          s.base[x] = s.grad[0][at_row + x] * oz + s.grad[1][at_row + x] * oy - s.inner[at_row + x];
        query_rows(t, s.center + at_row * a.C, s.rows, s.bias, s.base, s.grad[2] + at_row, s.lse + at_row,
                   s.sum + at_row * a.C, s.weighted + at_row * a.C, s.excess + at_row);
      }
    }
  }
  for (int64_t y = 0; y < tile.ny; y++)
    for (int64_t c = 0; c < a.C; c++) {
      A* sum = s.sum + (y * a.C + c) * t.width;
      if (a.J > 1)
        for (int64_t x = 0; x < t.width; x++)
          sum[x] -= s.excess[y * t.width + x] * s.weighted[(y * a.C + c) * t.width + x];
      store_row(a.dtype, a.grad_q, at(t, b, a.J * a.C, j * a.C + c, tile.z, tile.y + y, tile.x), tile.nx,
                static_cast<A>(a.scale / a.J), sum);
    }
  if (ring) std::memcpy(ring, s.excess, plane * sizeof(A));
}

// grad_k of one tile in group j. `excess(z, y, x0, n, dst)` copies a row of the queries' excess, where there is any.
template <class A, class Excess>
inline void grad_keys(const VeuTiles<A>& t, int64_t b, int64_t j, const VeuTile<A>& tile, const BackwardBuffers<A>& s,
                      const Excess& excess) {
  const Veu& a = t.a;
  load_tile(t, tile, a.k, b, j, A(1), s.center);
  fill(s.sum, t.rows * a.C * t.width, A(0));
  const Inside in = inside_row(t, tile);
  for (int64_t z = max<int64_t>(0, tile.z - t.R[0]); z <= min(t.D - 1, tile.z + t.R[0]); z++) {
    const int64_t last = min(t.H - 1, tile.y + tile.ny - 1 + t.R[1]);
    for (int64_t y = max<int64_t>(0, tile.y - t.R[1]); y <= last; y++) {
      load_features(t, tile, a.q, b, j, z, y, static_cast<A>(a.scale * kLog2e), s.rows);
      fill(s.grad[0], t.halo, A(0));
      for (int64_t i = 0; i < a.d; i++)
        load_halo(t, tile, a.grad_v, at(t, b, a.d, i, z, y, 0), A(0), s.grad[3 - a.d + i]);
      load_inner(t, s.grad, t.halo, s.base, s.inner,
                 [&](int64_t i, A* v) { load_halo(t, tile, a.v, at(t, b, a.d, i, z, y, 0), A(0), v); });
      load_halo(t, tile, a.lse, at(t, b, a.J, j, z, y, 0), -kInf<A>, s.lse);
      lse_to_base2(s.lse, t.halo);
      if (a.J > 1) {
        excess(z, y, in.x0, in.end - in.begin, s.excess);
        for (int64_t x = in.begin; x < in.end; x++) s.inner[x] += s.excess[x - in.begin];
      }
      for (int64_t row = first_row(t, tile, y); row < last_row(t, tile, y); row++) {
        const int64_t oz = tile.z - z, oy = tile.y + row - y;
        for (int64_t x = 0; x < t.halo; x++) s.base[x] = s.grad[0][x] * oz + s.grad[1][x] * oy - s.inner[x];
        key_rows(t, s.center + row * a.C * t.width, s.rows, s.base, s.grad[2], s.lse, s.sum + row * a.C * t.width);
      }
    }
  }
  for (int64_t y = 0; y < tile.ny; y++) {
    const bool* mask = a.mask ? a.mask + at(t, b, 1, 0, tile.z, tile.y + y, tile.x) : nullptr;
    for (int64_t c = 0; c < a.C; c++) {
      A* sum = s.sum + (y * a.C + c) * t.width;
      for (int64_t x = 0; mask && x < tile.nx; x++)
        if (!mask[x]) sum[x] = 0;
      // the queries carried scale * log2(e)
      store_row(a.dtype, a.grad_k, at(t, b, a.J * a.C, j * a.C + c, tile.z, tile.y + y, tile.x), tile.nx,
                static_cast<A>(kLn2 / a.J), sum);
    }
  }
}

template <class A>
inline void veu_bwd(const Veu& a) {
  const VeuTiles<A> t(a);
  // tiles are in the order of z, y, x: this many on either side hold every query that a tile's keys see
  const int64_t reach = (t.R[0] * t.ny + (t.R[1] + t.rows - 1) / t.rows + 1) * t.nx;
  const int64_t tile_size = t.rows * t.width, images = a.B * a.J;
  // images that are worked on together, and tiles of each between two turns of the ring
  int64_t together = images, step = t.n, ring_tiles = 0;
  if (a.J > 1) {
    together = max<int64_t>(1, min(images, kRingElements / (t.n * tile_size)));
    if (t.n * tile_size > kRingElements) step = max<int64_t>(t.ny * t.nx, kRingElements / tile_size - 2 * reach);
    ring_tiles = min(t.n, step + 2 * reach);
  }
  Scratch<A> ring_memory(together * ring_tiles * tile_size);
  A* ring = a.J > 1 ? ring_memory.take(together * ring_tiles * tile_size) : nullptr;
  const auto slot = [&](int64_t image, int64_t tile) {
    return ring + (image % together * ring_tiles + tile % ring_tiles) * tile_size;
  };
  // calls f(image, tile, buffers) for tiles [first, last) of every image of a batch of images, on all threads
  const auto for_tiles = [&](int64_t first_image, int64_t first, int64_t last, const auto& f) {
    const int64_t n = last - first;
    parallel_for(min(together, images - first_image) * n, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(BackwardBuffers<A>::size(t));
      const BackwardBuffers<A> buffers(t, scratch);
      for (int64_t i = begin; i < end; i++) f(first_image + i / n, first + i % n, buffers);
    });
  };
  for (int64_t image = 0; image < images; image += together) {
    int64_t done = 0;
    for (int64_t first = 0; first < t.n; first += step) {
      const int64_t last = min(t.n, first + step), ready = min(t.n, last + reach);
      for_tiles(image, done, ready, [&](int64_t i, int64_t tile, const BackwardBuffers<A>& s) {
        grad_queries(t, i / a.J, i % a.J, VeuTile<A>(t, tile), s, a.J > 1 ? slot(i, tile) : nullptr);
      });
      done = ready;
      for_tiles(image, first, last, [&](int64_t i, int64_t tile, const BackwardBuffers<A>& s) {
        grad_keys(t, i / a.J, i % a.J, VeuTile<A>(t, tile), s, [&](int64_t z, int64_t y, int64_t x, int64_t n, A* dst) {
          for (int64_t x1 = x; x1 < x + n;) {
            const int64_t tile_x = x1 / t.width, stop = min(x + n, (tile_x + 1) * t.width);
            const A* row = slot(i, (z * t.ny + y / t.rows) * t.nx + tile_x) + y % t.rows * t.width;
            std::memcpy(dst + x1 - x, row + x1 - tile_x * t.width, (stop - x1) * sizeof(A));
            x1 = stop;
          }
        });
      });
    }
  }
}

}  // namespace COVER_ISA
}  // namespace cover
