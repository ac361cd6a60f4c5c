// warp on the CPU: the flow is brought to the fine level segment by segment, coordinates are made once for all
// channels, and nothing of the fine flow's size is ever in memory.
//
// The backward is deterministic: grad_x is added up channel by channel, each by one thread in the order of the
// voxels; grad_flow is gathered by threads that each own a range of coarse lines.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kChannelBlock = 8;  // channels whose outputs wait for one another, to be written in rows

// One call: x in T, flow in F, accumulation in A, indices in I.
template <class T, class F, class I, int d>
struct Warper {
  using A = Acc<T>;
  const Warp& a;
  Grid fine, coarse;

  explicit Warper(const Warp& a) : a(a), fine{{a.S[0], a.S[1], a.S[2]}}, coarse(coarser(fine, a.stride)) {}

  struct State {
    Cells<A, I, d> cells;
    A position[d][kSegment];
    typename Cells<A, I, d>::Pair products[kSegment][Cells<A, I, d>::kRows];
    A grad[kSegment];
    T out[kChannelBlock][kSegment];
  };
  static auto make_state() { return std::unique_ptr<State>(new State); }

  int64_t row(const Segment& s) const { return (s.z * fine.S[1] + s.y) * fine.S[2] + s.x0; }

  // Sets u[axis][x] to Up(flow): interpolation along D and H for the coarse voxels that the segment spans, then
  // along W.
  void upsample(int64_t b, const Segment& s, A (*u)[kSegment]) const {
    const F* flow = static_cast<const F*>(a.flow) + b * d * coarse.numel();
    if (a.stride[0] * a.stride[1] * a.stride[2] == 1) {
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

  // position[axis][x] = p + Up(flow)(p) for the voxels p of a segment.
  void find_positions(int64_t b, const Segment& s, A (*position)[kSegment]) const {
    const int64_t origin[3] = {s.z, s.y, s.x0};
    upsample(b, s, position);
    for (int i = 0; i < d; i++)
      for (int64_t x = 0; x < s.n; x++)
        position[i][x] += static_cast<A>(static_cast<int32_t>(origin[3 - d + i] + (i == d - 1 ? x : 0)));
  }

  void find_cells(int64_t b, const Segment& s, State& state) const {
    find_positions(b, s, state.position);
    state.cells.find(fine, a.border, state.position, s.n);
  }

  // Samples all channels of a segment from the image itself: for a flow so rough that a box of it would be too large.
  void sample_direct(int64_t b, const Segment& s, State& state) const {
    find_cells(b, s, state);
    const int64_t numel = fine.numel();
    for (int64_t c0 = 0; c0 < a.C; c0 += kChannelBlock) {
      const int64_t channels = min(kChannelBlock, a.C - c0), image = (b * a.C + c0) * numel;
      state.cells.gather(static_cast<const T*>(a.x) + image, channels, numel, s.n,
                         [&](int64_t c, int64_t x, A value) { state.out[c][x] = static_cast<T>(value); });
      for (int64_t c = 0; c < channels; c++)
        std::memcpy(static_cast<T*>(a.y) + image + c * numel + row(s), state.out[c], s.n * sizeof(T));
    }
  }

  // A box of voxels of the output, at most kTile, with the positions that they read.
  static constexpr int64_t kTile[3] = {d == 3 ? 16 : 1, d == 3 ? 16 : 64, d == 3 ? 16 : 64};
  static constexpr int64_t kTileVoxels = kTile[0] * kTile[1] * kTile[2];

  template <int W>
  struct TileState {
    State segment;
    A position[d][kTileVoxels];
    Lanes<A, W> box[kBoxBytes / sizeof(Lanes<A, W>)], out[kSegment];
  };

  // Calls f(segment, index of its first voxel in the tile) for the lines of `part` of a tile.
  template <class Visit>
  void for_lines(const Box& tile, const Box& part, const Visit& f) const {
    for (int64_t z = part.low[0]; z < part.low[0] + part.grid.S[0]; z++)
      for (int64_t y = part.low[1]; y < part.low[1] + part.grid.S[1]; y++)
        f(Segment{z, y, part.low[2], part.grid.S[2]},
          ((z - tile.low[0]) * tile.grid.S[1] + y - tile.low[1]) * tile.grid.S[2] + part.low[2] - tile.low[2]);
  }

  template <int W>
  void forward_tile(int64_t b, const Box& tile, TileState<W>& state) const {
    for_lines(tile, tile, [&](const Segment& s, int64_t first) {
      find_positions(b, s, state.segment.position);
      for (int i = 0; i < d; i++) std::memcpy(state.position[i] + first, state.segment.position[i], s.n * sizeof(A));
    });
    forward_part<W>(b, tile, tile, state);
  }

  // Samples a part of a tile from the box of the image that it reads; halves the part while that box is too large.
  template <int W>
  void forward_part(int64_t b, const Box& tile, const Box& part, TileState<W>& state) const {
    Extent<A> extent[d];
    for (int i = 0; i < d; i++) extent[i] = {splat(kInf<A>), splat(-kInf<A>)};
    for_lines(tile, part, [&](const Segment& s, int64_t first) {
      for (int i = 0; i < d; i++) extent[i].add(state.position[i] + first, s.n);
    });
    const Box box = box_around(fine, extent, d);
    if (box.numel() * static_cast<int64_t>(sizeof(Lanes<A, W>)) > kBoxBytes) {
      const int64_t* S = part.grid.S;
      const int axis = S[0] >= max(S[1], S[2]) ? 0 : S[1] >= S[2] ? 1 : 2;
      if (S[axis] <= 4)
        return for_lines(tile, part, [&](const Segment& s, int64_t) { sample_direct(b, s, state.segment); });
      Box half = part;
      half.grid.S[axis] = part.grid.S[axis] / 2;
      forward_part<W>(b, tile, half, state);
      half.low[axis] += half.grid.S[axis];
      half.grid.S[axis] = part.grid.S[axis] - half.grid.S[axis];
      return forward_part<W>(b, tile, half, state);
    }
    for (int64_t c0 = 0; c0 < a.C; c0 += W) {
      const int64_t channels = min<int64_t>(W, a.C - c0), numel = fine.numel(), image = (b * a.C + c0) * numel;
      A* const scratch = reinterpret_cast<A*>(state.box);
      load_box<W>(static_cast<const T*>(a.x) + image, fine, box, channels, scratch);
      for_lines(tile, part, [&](const Segment& s, int64_t first) {
        for (int i = 0; i < d; i++)
          for (int64_t x = 0; x < s.n; x++)
            state.segment.position[i][x] = state.position[i][first + x] - static_cast<A>(box.low[3 - d + i]);
        state.segment.cells.find(box.grid, a.border, state.segment.position, s.n);
        state.segment.cells.template gather_lanes<W>(scratch, s.n, reinterpret_cast<A*>(state.out));
        to_channels_first<W>(reinterpret_cast<const A*>(state.out), numel, channels, s.n,
                             static_cast<T*>(a.y) + image + row(s));
      });
    }
  }

  template <int W>
  void forward_tiles() const {
    int64_t tiles[3];
    for (int i = 0; i < 3; i++) tiles[i] = (fine.S[i] + kTile[i] - 1) / kTile[i];
    const int64_t n = tiles[0] * tiles[1] * tiles[2];
    parallel_for(a.B * n, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<TileState<W>> state(new TileState<W>);
      for (int64_t i = begin; i < end; i++) {
        const int64_t at[3] = {i % n / (tiles[1] * tiles[2]), i / tiles[2] % tiles[1], i % tiles[2]};
        Box tile;
        for (int axis = 0; axis < 3; axis++) {
          tile.low[axis] = at[axis] * kTile[axis];
          tile.grid.S[axis] = min(kTile[axis], fine.S[axis] - tile.low[axis]);
        }
        forward_tile<W>(i / n, tile, *state);
      }
    });
  }

  void forward() const {
    constexpr int kWide = kLanes<A>;
    if (a.C > kWide / 2)
      forward_tiles<kWide>();
    else
      forward_tiles<kWide / 2>();
  }

  // Reads grad_y in channels c0, c0 + 1, .. of a segment.
  auto grad_reader(int64_t b, int64_t c0, const Segment& s) const {
    const T* g = static_cast<const T*>(a.grad_y) + (b * a.C + c0) * fine.numel() + row(s);
    return [g, numel = fine.numel()](int64_t c, int64_t x) { return static_cast<A>(g[c * numel + x]); };
  }

  // Channels are shared out in as many groups as keep all threads busy: coordinates are made once for a group.
  void grad_x() const {
    const int64_t numel = fine.numel(), outer = fine.S[3 - d];
    parallel_for(a.B * a.C, [&](int64_t begin, int64_t end) {
      auto state = make_state();
      // half precision is added up in float, a channel at a time
      constexpr bool kWide = std::is_same_v<T, A>;
      Scratch<A> memory(kWide ? 1 : numel);
      A* wide = kWide ? nullptr : memory.take(numel);
      while (begin < end) {
        const int64_t b = begin / a.C, first = begin % a.C;
        const int64_t last = kWide ? min(a.C, first + end - begin) : first + 1;
        A* sums = kWide ? static_cast<A*>(a.grad_x) + (b * a.C + first) * numel : wide;
        fill(sums, (last - first) * numel, A(0));
        for_segments<d>(fine, 0, outer, [&](const Segment& s) {
          find_cells(b, s, *state);
          state->cells.scatter(sums, last - first, numel, s.n, grad_reader(b, first, s));
        });
        if (!kWide) store_row(a.dtype, a.grad_x, (b * a.C + first) * numel, numel, A(1), wide);
        begin += last - first;
      }
    });
  }

  void grad_flow() const {
    const int64_t outer = coarse.S[3 - d], stride = a.stride[3 - d], halo = stride / 2;
    constexpr bool kWide = std::is_same_v<F, A>;
    const int64_t numel = a.B * d * coarse.numel();
    Scratch<A> memory(kWide ? 1 : numel);
    A* sums = kWide ? static_cast<A*>(a.grad_flow) : memory.take(numel);
    fill(sums, numel, A(0));
    parallel_for(a.B * outer, [&](int64_t begin, int64_t end) {
      auto state = make_state();
      while (begin < end) {
        const int64_t b = begin / outer, first = begin % outer, last = min(outer, first + end - begin);
        const int64_t low = max<int64_t>(0, first * stride - halo);
        const int64_t high = min(fine.S[3 - d], last * stride + halo);
        for_segments<d>(fine, low, high, [&](const Segment& s) {
          find_cells(b, s, *state);
          state->cells.corner_products(static_cast<const T*>(a.x) + b * a.C * fine.numel(), a.C, fine.numel(), s.n,
                                       state->products, grad_reader(b, 0, s));
          for (int i = 0; i < d; i++) {
            state->cells.position_gradient(state->products, i, s.n, state->grad);
            spread(s, state->grad, static_cast<A>(a.stride[3 - d + i]), first, last,
                   sums + (b * d + i) * coarse.numel());
          }
        });
        begin += last - first;
      }
    });
    if (!kWide) store_row(a.flow_dtype, a.grad_flow, 0, numel, A(1), sums);
  }

  // The transpose of `upsample`, into the coarse lines [first, last) of the outermost axis.
  void spread(const Segment& s, const A* g, A factor, int64_t first, int64_t last, A* sums) const {
    const Between<A> z(s.z, a.stride[0], coarse.S[0]), y(s.y, a.stride[1], coarse.S[1]);
    const int64_t zs[2] = {z.i0, z.i1}, ys[2] = {y.i0, y.i1};
    const A wz[2] = {1 - z.fraction, z.fraction}, wy[2] = {1 - y.fraction, y.fraction};
    for (int k = 0; k < 4; k++) {
      const int64_t owner = d == 3 ? zs[k >> 1] : ys[k & 1];
      const A w = factor * wz[k >> 1] * wy[k & 1];
      if (w == A(0) || owner < first || owner >= last) continue;
      A* to = line(sums, zs[k >> 1], ys[k & 1]);
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
  with_warper(a, [](const auto& warper) {
    warper.grad_x();
    warper.grad_flow();
  });
}

}  // namespace COVER_ISA
}  // namespace cover
