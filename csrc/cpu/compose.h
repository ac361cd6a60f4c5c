// compose on the CPU: y = residual + Up(flow)(p + residual), the coarse flow being read once per voxel.
//
// grad_residual is local; grad_flow is added up by threads that own lines of it, in the order of the tiles, so that the
// result is the same whatever the number of threads.
namespace cover {
namespace COVER_ISA {

// One call: tensors in T, accumulation in A, indices in I.
template <class T, class I, int d>
struct Composer {
  using A = Acc<T>;
  using Work = Tile<A, I, d>;
  static constexpr int64_t W = kWidth<A>;
  const Compose& a;
  Grid fine, coarse;
  Tiling<d> tiles;

  explicit Composer(const Compose& a)
      : a(a), fine{{a.S[0], a.S[1], a.S[2]}}, coarse(coarser(fine, a.stride)), tiles(fine, spread()) {}

  A spread() const { return d == 2 ? COVER_ISA::spread<A>(static_cast<const T*>(a.residual), a.B, fine, 1) : A(0); }

  A stride(int64_t axis) const { return static_cast<A>(a.stride[3 - d + axis]); }

  // Offset of a segment in component `axis` of a fine tensor [B, d, *S].
  int64_t fine_at(int64_t b, int64_t axis, const Segment& s) const {
    return (b * d + axis) * fine.numel() + (s.z * fine.S[1] + s.y) * fine.S[2] + s.x0;
  }
  const T* flow(int64_t b, int64_t axis) const {
    return static_cast<const T*>(a.flow) + (b * d + axis) * coarse.numel();
  }

  // Makes the tile that of voxels `part`: its positions are p + residual(p) on the coarse level.
  void place(int64_t b, const Box& part, Work& tile) const {
    tile.part = part;
    tile.for_lines([&](const Segment& s, int64_t first) {
      const int64_t origin[3] = {s.z, s.y, s.x0};
      for (int i = 0; i < d; i++) {
        const T* const residual = static_cast<const T*>(a.residual) + fine_at(b, i, s);
        A* const position = tile.position[i] + first;
        for (int64_t x = 0; x < s.n; x++) {
          const A p = static_cast<A>(static_cast<int32_t>(origin[3 - d + i] + (i == d - 1 ? x : 0)));
          position[x] = p + static_cast<A>(residual[x]);
        }
        to_coarse(position, s.n, a.stride[3 - d + i]);
      }
    });
    tile.complete(coarse);
  }

  // Calls f(image of the batch, tile with cells) for all tiles, on all threads.
  template <bool kSlopes, class F>
  void for_tiles(const F& f) const {
    parallel_for(a.B * tiles.count(), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Work> tile(new Work);
      for (int64_t i = begin; i < end; i++) {
        place(i / tiles.count(), tiles[i % tiles.count()], *tile);
        tile->template find_cells_in_image<kSlopes>(true);
        f(i / tiles.count(), *tile);
      }
    });
  }

  void forward() const {
    prefer_large_pages(a.y, a.B * d * fine.numel() * sizeof(T));
    for_tiles<false>([&](int64_t b, Work& tile) {
      for (int i = 0; i < d; i++)
        tile.for_lines([&](const Segment& s, int64_t first) {
          A up[kSegment];
          tile.cells.gather_channel(flow(b, i), first, first + s.n, up);
          const T* const residual = static_cast<const T*>(a.residual) + fine_at(b, i, s);
          T* const y = static_cast<T*>(a.y) + fine_at(b, i, s);
          const A factor = stride(i);
          for (int64_t x = 0; x < s.n; x++) y[x] = static_cast<T>(static_cast<A>(residual[x]) + factor * up[x]);
        });
    });
  }

  // The gradient of a sampled component of a segment: displacements were multiplied by their stride.
  void load_grad(int64_t b, int64_t axis, const Segment& s, A* g) const {
    const T* const grad = static_cast<const T*>(a.grad_y) + fine_at(b, axis, s);
    const A factor = stride(axis);
    for (int64_t x = 0; x < s.n; x++) g[x] = factor * static_cast<A>(grad[x]);
  }

  void grad_residual() const {
    prefer_large_pages(a.grad_residual, a.B * d * fine.numel() * sizeof(T));
    for_tiles<true>([&](int64_t b, Work& tile) {
      for (int i = 0; i < d; i++) fill(tile.grad[i], tile.numel(), A(0));
      for (int c = 0; c < d; c++)
        tile.for_lines([&](const Segment& s, int64_t first) {
          A g[kSegment] = {};
          load_grad(b, c, s, g);
          tile.cells.channel_gradient(flow(b, c), first, first + s.n, g, tile.grad);
        });
      tile.for_lines([&](const Segment& s, int64_t first) {
        for (int i = 0; i < d; i++) {
          const T* const grad_y = static_cast<const T*>(a.grad_y) + fine_at(b, i, s);
          T* const grad = static_cast<T*>(a.grad_residual) + fine_at(b, i, s);
          const A* const g = tile.grad[i] + first;
          for (int64_t x = 0; x < s.n; x++) grad[x] = static_cast<T>(static_cast<A>(grad_y[x]) + g[x] / stride(i));
        }
      });
    });
  }

  void grad_flow() const {
    image_gradient<T, I, d>(
        a.B, d, coarse, tiles, true, static_cast<T*>(a.grad_flow),
        [&](int64_t b, const Box& part, Work& tile) { place(b, part, tile); },
        [&](int64_t b, int64_t c0, int64_t n, const Segment& s, Channels<A>* line) {
          A g[W][kSegment];
          for (int64_t i = 0; i < n; i++) load_grad(b, c0 + i, s, g[i]);
          to_channels_last<A>(g[0], kSegment, n, s.n, line);
        });
  }
};

// Calls f(composer).
template <class F>
inline void with_composer(const Compose& a, const F& f) {
  const Grid coarse = coarser(Grid{{a.S[0], a.S[1], a.S[2]}}, a.stride);
  with_storage(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_geometry(a.d, coarse.numel(),
                  [&](auto d, auto index) { f(Composer<T, decltype(index), decltype(d)::value>(a)); });
  });
}

inline void compose_fwd(const Compose& a) {
  with_composer(a, [](const auto& composer) { composer.forward(); });
}

inline void compose_bwd(const Compose& a) {
  with_composer(a, [](const auto& composer) {
    composer.grad_residual();
    composer.grad_flow();
  });
}

}  // namespace COVER_ISA
}  // namespace cover
