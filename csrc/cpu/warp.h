// warp on the CPU: the flow is brought to the fine level tile by tile, cells are made once for all channels, and
// nothing of the fine flow's size is ever in memory.
//
// The backward is deterministic: threads own lines of grad_x, and lines of the coarse grad_flow, and add to each sum in
// the order of the tiles.
namespace cover {
namespace COVER_ISA {

// One call: x in T, flow in F, accumulation in A, indices in I.
template <class T, class F, class I, int d>
struct Warper {
  using A = Acc<T>;
  using Work = Tile<A, I, d>;
  static constexpr int64_t W = kWidth<A>, kFew = W / 2;  // channels
  const Warp& a;
  Grid fine, coarse;
  Tiling<d> tiles;

  explicit Warper(const Warp& a)
      : a(a), fine{{a.S[0], a.S[1], a.S[2]}}, coarse(coarser(fine, a.stride)), tiles(fine, spread()) {}

  A spread() const {
    return d == 2 ? a.stride[1] * COVER_ISA::spread<A>(static_cast<const F*>(a.flow), a.B, coarse, a.stride[1]) : A(0);
  }

  bool same_level() const { return a.stride[0] * a.stride[1] * a.stride[2] == 1; }
  int64_t row(const Segment& s) const { return (s.z * fine.S[1] + s.y) * fine.S[2] + s.x0; }

  // Sets u[axis][x] to Up(flow): interpolation along D and H for the coarse voxels that the segment spans, then
  // along W.
  void upsample(int64_t b, const Segment& s, A* const* u) const {
    const F* flow = static_cast<const F*>(a.flow) + b * d * coarse.numel();
    if (same_level()) {
      for (int axis = 0; axis < d; axis++)
        for (int64_t x = 0; x < s.n; x++) u[axis][x] = static_cast<A>(flow[axis * fine.numel() + row(s) + x]);
      return;
    }
    const Between<A> z(s.z, a.stride[0], coarse.S[0]), y(s.y, a.stride[1], coarse.S[1]);
    const A w[4] = {(1 - z.fraction) * (1 - y.fraction), (1 - z.fraction) * y.fraction, z.fraction * (1 - y.fraction),
                    z.fraction * y.fraction};
    const int64_t first = Between<A>(s.x0, a.stride[2], coarse.S[2]).i0;
    const int64_t last = Between<A>(s.x0 + s.n - 1, a.stride[2], coarse.S[2]).i1;
    A coarse_row[d][kSegment + 2];
    for (int axis = 0; axis < d; axis++) {
      const F* f = flow + axis * coarse.numel() + first;
      const F* rows[4] = {line(f, z.i0, y.i0), line(f, z.i0, y.i1), line(f, z.i1, y.i0), line(f, z.i1, y.i1)};
      fill(coarse_row[axis], last - first + 1, A(0));
      for (int k = 0; k < 4; k++)
        if (w[k] != A(0))
          for (int64_t x = 0; x <= last - first; x++) coarse_row[axis][x] += w[k] * static_cast<A>(rows[k][x]);
    }
    for (int64_t i = 0; i < s.n; i++) {
      const Between<A> x(s.x0 + i, a.stride[2], coarse.S[2]);
      for (int axis = 0; axis < d; axis++) {
        const A left = coarse_row[axis][x.i0 - first], right = coarse_row[axis][x.i1 - first];
        // a neighbour of weight 0 adds nothing, be it infinite
        const A between = x.fraction == A(0) ? left : (1 - x.fraction) * left + x.fraction * right;
        u[axis][i] = static_cast<A>(a.stride[3 - d + axis]) * between;
      }
    }
  }

  template <class P>
  P* line(P* flow, int64_t z, int64_t y) const {
    return flow + (z * coarse.S[1] + y) * coarse.S[2];
  }

  // Makes the tile that of voxels `part`: its positions are p + Up(flow)(p).
  void place(int64_t b, const Box& part, Work& tile) const {
    tile.part = part;
    tile.for_lines([&](const Segment& s, int64_t first) {
      A* position[d];
      for (int i = 0; i < d; i++) position[i] = tile.position[i] + first;
      upsample(b, s, position);
      const int64_t origin[3] = {s.z, s.y, s.x0};
      for (int i = 0; i < d; i++)
        for (int64_t x = 0; x < s.n; x++)
          position[i][x] += static_cast<A>(static_cast<int32_t>(origin[3 - d + i] + (i == d - 1 ? x : 0)));
    });
    tile.complete(fine);
  }

  // Calls f(offset of channel c0 of image b, number of channels) for the channels, W at a time.
  template <class G>
  void for_channels(int64_t b, const G& f) const {
    for (int64_t c0 = 0; c0 < a.C; c0 += W) f((b * a.C + c0) * fine.numel(), min(W, a.C - c0));
  }

  void forward() const {
    prefer_large_pages(a.y, a.B * a.C * fine.numel() * sizeof(T));
    parallel_for(a.B * tiles.count(), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Work> tile(new Work);
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / tiles.count();
        place(b, tiles[i % tiles.count()], *tile);
        a.channels_last ? sample_channels_last(b, *tile) : a.C < kFew ? sample_few(b, *tile) : sample(b, *tile);
      }
    });
  }

  void sample(int64_t b, Work& tile) const {
    tile.enclose();
    tile.template find_cells<false>(a.border);
    for_channels(b, [&](int64_t image, int64_t channels) {
      tile.load(static_cast<const T*>(a.x) + image, channels);
      tile.for_lines([&](const Segment& s, int64_t first) {
        tile.gather(first, first + s.n);
        to_channels_first<A>(tile.line, fine.numel(), channels, s.n, static_cast<T*>(a.y) + image + row(s));
      });
    });
  }

  // Copies for few channels would take longer than to read them one by one.
  void sample_few(int64_t b, Work& tile) const {
    tile.template find_cells_in_image<false>(a.border);
    for (int64_t c = b * a.C; c < (b + 1) * a.C; c++)
      tile.for_lines([&](const Segment& s, int64_t first) {
        A line[kSegment];
        tile.cells.gather_channel(static_cast<const T*>(a.x) + c * fine.numel(), first, first + s.n, line);
        T* const y = static_cast<T*>(a.y) + c * fine.numel() + row(s);
        for (int64_t x = 0; x < s.n; x++) y[x] = static_cast<T>(line[x]);
      });
  }

  // What lies in memory as it is worked on needs no copies.
  void sample_channels_last(int64_t b, Work& tile) const {
    tile.template find_cells_in_image<false>(a.border);
    tile.for_lines([&](const Segment& s, int64_t first) {
      tile.cells.gather(voxel(a.x, b, 0), a.C, first, first + s.n, voxel(a.y, b, row(s)));
    });
  }

  // The channels of a voxel of a tensor [B, *S, C].
  const T* voxel(const void* p, int64_t b, int64_t i) const { return voxel(const_cast<void*>(p), b, i); }
  T* voxel(void* p, int64_t b, int64_t i) const { return static_cast<T*>(p) + (b * fine.numel() + i) * a.C; }

  void grad_x() const {
    prefer_large_pages(a.grad_x, a.B * a.C * fine.numel() * sizeof(T));
    if (a.channels_last) return grad_x_channels_last();
    image_gradient<T, I, d>(
        a.B, a.C, fine, tiles, a.border, static_cast<T*>(a.grad_x),
        [&](int64_t b, const Box& part, Work& tile) { place(b, part, tile); },
        [&](int64_t b, int64_t c0, int64_t channels, const Segment& s, Channels<A>* line) {
          const T* g = static_cast<const T*>(a.grad_y) + (b * a.C + c0) * fine.numel() + row(s);
          to_channels_last<A>(g, fine.numel(), channels, s.n, line);
        });
  }

  // As `image_gradient` does it, without copies.
  void grad_x_channels_last() const {
    constexpr bool kDirect = std::is_same_v<T, A>;
    const int64_t outer = fine.S[0] * fine.S[1], line = fine.S[2] * a.C;
    const int64_t most = kDirect ? outer : max<int64_t>(1, kSums / line);
    parallel_for(a.B * outer, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Work> tile(new Work);
      Scratch<A> memory(kDirect ? 0 : min(most, outer) * line);
      A* const taken = kDirect ? nullptr : memory.take(min(most, outer) * line);
      while (begin < end) {
        const int64_t b = begin / outer, first = begin % outer, lines = min(min(outer - first, end - begin), most);
        const Range range{first * fine.S[2], (first + lines) * fine.S[2]};
        T* const own = voxel(a.grad_x, b, range.begin);
        A* const sums = kDirect ? reinterpret_cast<A*>(own) : taken;
        fill(sums, lines * line, A(0));
        for (int64_t i = 0; i < tiles.count(); i++) {
          place(b, tiles[i], *tile);
          tile->enclose();
          if (!tile->reads(range)) continue;
          tile->template find_cells_in_image<false>(a.border);
          tile->for_lines([&](const Segment& s, int64_t at) {
            tile->cells.scatter(sums - range.begin * a.C, a.C, at, at + s.n, voxel(a.grad_y, b, row(s)),
                                [&](int64_t voxel) { return voxel >= range.begin && voxel < range.end; });
          });
        }
        for (int64_t x = 0; !kDirect && x < lines * line; x++) own[x] = static_cast<T>(sums[x]);
        begin += lines;
      }
    });
  }

  // Sets the tile's `grad` in the lines [low, high) along the outermost axis.
  void position_gradient(int64_t b, int64_t low, int64_t high, Work& tile) const {
    for (int i = 0; i < d; i++) fill(tile.grad[i], tile.numel(), A(0));
    const auto for_owned = [&](const auto& f) {
      tile.for_lines([&](const Segment& s, int64_t first) {
        const int64_t at = d == 3 ? s.z : s.y;
        if (at >= low && at < high) f(s, first);
      });
    };
    if (a.channels_last) {
      tile.template find_cells_in_image<true>(a.border);
      for_owned([&](const Segment& s, int64_t first) {
        tile.cells.position_gradient(voxel(a.x, b, 0), a.C, first, first + s.n, voxel(a.grad_y, b, row(s)), tile.grad);
      });
    } else if (a.C < kFew) {
      tile.template find_cells_in_image<true>(a.border);
      for (int64_t c = b * a.C; c < (b + 1) * a.C; c++)
        for_owned([&](const Segment& s, int64_t first) {
          A g[kSegment] = {};
          const T* const grad_y = static_cast<const T*>(a.grad_y) + c * fine.numel() + row(s);
          for (int64_t x = 0; x < s.n; x++) g[x] = static_cast<A>(grad_y[x]);
          tile.cells.channel_gradient(static_cast<const T*>(a.x) + c * fine.numel(), first, first + s.n, g, tile.grad);
        });
    } else {
      tile.enclose();
      tile.template find_cells<true>(a.border);
      for_channels(b, [&](int64_t image, int64_t channels) {
        tile.load(static_cast<const T*>(a.x) + image, channels);
        for_owned([&](const Segment& s, int64_t first) {
          const T* const grad_y = static_cast<const T*>(a.grad_y) + image + row(s);
          to_channels_last<A>(grad_y, fine.numel(), channels, s.n, tile.line);
          tile.position_gradient(first, first + s.n);
        });
      });
    }
  }

  void backward() const {
    grad_x();
    grad_flow();
  }

  // Each thread owns coarse lines and gathers from the fine ones around them.
  void grad_flow() const {
    const int64_t outer = coarse.S[3 - d], stride = a.stride[3 - d], halo = stride / 2;
    // half precision is added up in float, a few lines at a time
    constexpr bool kDirect = std::is_same_v<F, A>;
    const int64_t line = coarse.numel() / outer, most = kDirect ? outer : max<int64_t>(1, kSums / (d * line));
    parallel_for(a.B * outer, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Work> tile(new Work);
      Scratch<A> memory(kDirect ? 0 : d * min(most, outer) * line);
      A* const taken = kDirect ? nullptr : memory.take(d * min(most, outer) * line);
      while (begin < end) {
        const int64_t b = begin / outer, first = begin % outer, last = min(outer, first + min(most, end - begin));
        const int64_t n = (last - first) * line;
        F* const own = static_cast<F*>(a.grad_flow) + b * d * coarse.numel() + first * line;
        A* sums[d];
        for (int axis = 0; axis < d; axis++) {
          sums[axis] = kDirect ? reinterpret_cast<A*>(own + axis * coarse.numel()) : taken + axis * n;
          fill(sums[axis], n, A(0));
        }
        const int64_t low = max<int64_t>(0, first * stride - halo);
        const int64_t high = min(fine.S[3 - d], last * stride + halo);
        for (int64_t i = 0; i < tiles.count(); i++) {
          const Box part = tiles[i];
          if (part.low[3 - d] >= high || part.low[3 - d] + part.grid.S[3 - d] <= low) continue;
          place(b, part, *tile);
          position_gradient(b, low, high, *tile);
          tile->for_lines([&](const Segment& s, int64_t at) {
            for (int axis = 0; axis < d; axis++)
              spread(s, tile->grad[axis] + at, static_cast<A>(a.stride[3 - d + axis]), first, last, sums[axis]);
          });
        }
        for (int axis = 0; axis < d && !kDirect; axis++)
          for (int64_t x = 0; x < n; x++) own[axis * coarse.numel() + x] = static_cast<F>(sums[axis][x]);
        begin += last - first;
      }
    });
  }

  // The transpose of `upsample`, into the coarse lines [first, last) of the outermost axis, which `sums` holds.
  void spread(const Segment& s, const A* g, A factor, int64_t first, int64_t last, A* sums) const {
    const int64_t begin = first * (coarse.numel() / coarse.S[3 - d]);
    if (same_level()) {
      const int64_t owner = d == 3 ? s.z : s.y;
      if (owner >= first && owner < last) std::memcpy(sums + row(s) - begin, g, s.n * sizeof(A));
      return;
    }
    const Between<A> z(s.z, a.stride[0], coarse.S[0]), y(s.y, a.stride[1], coarse.S[1]);
    const int64_t zs[2] = {z.i0, z.i1}, ys[2] = {y.i0, y.i1};
    const A wz[2] = {1 - z.fraction, z.fraction}, wy[2] = {1 - y.fraction, y.fraction};
    for (int k = 0; k < 4; k++) {
      const int64_t owner = d == 3 ? zs[k >> 1] : ys[k & 1];
      const A w = factor * wz[k >> 1] * wy[k & 1];
      if (w == A(0) || owner < first || owner >= last) continue;
      A* to = sums + (zs[k >> 1] * coarse.S[1] + ys[k & 1]) * coarse.S[2] - begin;
      for (int64_t i = 0; i < s.n; i++) {
        const Between<A> x(s.x0 + i, a.stride[2], coarse.S[2]);
        to[x.i0] += w * (1 - x.fraction) * g[i];
        to[x.i1] += w * x.fraction * g[i];
      }
    }
  }
};

template <class F>
inline void with_warper(const Warp& a, const F& f) {
  with_storage(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_geometry(a.d, a.S[0] * a.S[1] * a.S[2], [&](auto d, auto index) {
      if (a.flow_dtype == a.dtype)
        f(Warper<T, T, decltype(index), decltype(d)::value>(a));
      else
        f(Warper<T, Acc<T>, decltype(index), decltype(d)::value>(a));
    });
  });
}

inline void warp_fwd(const Warp& a) {
  with_warper(a, [](const auto& warper) { warper.forward(); });
}

inline void warp_bwd(const Warp& a) {
  with_warper(a, [](const auto& warper) { warper.backward(); });
}

}  // namespace COVER_ISA
}  // namespace cover
