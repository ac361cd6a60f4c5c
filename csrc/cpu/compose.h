// compose on the CPU: y = residual + Up(flow)(p + residual), the coarse flow being read once per voxel.
//
// grad_residual is local; grad_flow is added up component by component, each by one thread in the order of the
// voxels, so that the result is the same whatever the number of threads.
namespace cover {
namespace COVER_ISA {

template <class A, class I, int d>
struct Composer {
  const Compose& a;
  Grid fine, coarse;

  explicit Composer(const Compose& a) : a(a), fine{{a.S[0], a.S[1], a.S[2]}}, coarse(coarser(fine, a.stride)) {}

  struct State {
    Cells<A, I, d> cells;
    A residual[d][kSegment], position[d][kSegment];
    typename Cells<A, I, d>::Pair products[kSegment][Cells<A, I, d>::kRows];
    A value[d][kSegment];
  };
  static auto make_state() { return std::unique_ptr<State>(new State); }

  int64_t stride(int axis) const { return a.stride[3 - d + axis]; }

  // Offset of a segment in component `axis` of a fine tensor [B, d, *S].
  int64_t fine_at(int64_t b, int axis, const Segment& s) const {
    return (b * d + axis) * fine.numel() + (s.z * fine.S[1] + s.y) * fine.S[2] + s.x0;
  }
  int64_t coarse_at(int64_t b, int axis) const { return (b * d + axis) * coarse.numel(); }

  void find_cells(int64_t b, const Segment& s, State& state) const {
    const int64_t origin[3] = {s.z, s.y, s.x0};
    for (int i = 0; i < d; i++) {
      load_row(a.dtype, a.residual, fine_at(b, i, s), s.n, A(1), state.residual[i]);
      for (int64_t x = 0; x < s.n; x++) {
        const A p = static_cast<A>(origin[3 - d + i] + (i == d - 1 ? x : 0));
        state.position[i][x] = coarse_position(p + state.residual[i][x], stride(i));
      }
    }
    state.cells.find(coarse, true, state.position, s.n);
  }

  template <class T>
  void forward(const T* flow) const {
    parallel_segments<d>(a.B, fine, make_state, [&](int64_t b, const Segment& s, State& state) {
      find_cells(b, s, state);
      state.cells.gather(flow + coarse_at(b, 0), d, coarse.numel(), s.n, [&](int64_t i, int64_t x, A up) {
        state.value[i][x] = state.residual[i][x] + static_cast<A>(stride(i)) * up;
      });
      for (int i = 0; i < d; i++) store_row(a.dtype, a.y, fine_at(b, i, s), s.n, A(1), state.value[i]);
    });
  }

  template <class T>
  void grad_residual(const T* flow) const {
    parallel_segments<d>(a.B, fine, make_state, [&](int64_t b, const Segment& s, State& state) {
      find_cells(b, s, state);
      for (int i = 0; i < d; i++) load_row(a.dtype, a.grad_y, fine_at(b, i, s), s.n, A(1), state.value[i]);
      // the displacements were multiplied by the stride of their axis
      state.cells.corner_products(flow + coarse_at(b, 0), d, coarse.numel(), s.n, state.products,
                                  [&](int64_t i, int64_t x) { return static_cast<A>(stride(i)) * state.value[i][x]; });
      for (int i = 0; i < d; i++) {
        A moved[kSegment];
        state.cells.position_gradient(state.products, i, s.n, moved);
        for (int64_t x = 0; x < s.n; x++) state.value[i][x] += moved[x] / static_cast<A>(stride(i));
        store_row(a.dtype, a.grad_residual, fine_at(b, i, s), s.n, A(1), state.value[i]);
      }
    });
  }

  void grad_flow() const {
    const int64_t numel = coarse.numel();
    parallel_for(a.B * d, [&](int64_t begin, int64_t end) {
      auto state = make_state();
      Scratch<A> memory(numel);
      A* sums = memory.take(numel);
      for (int64_t component = begin; component < end; component++) {
        const int64_t b = component / d;
        const int i = static_cast<int>(component % d);
        fill(sums, numel, A(0));
        for_segments<d>(fine, 0, fine.S[3 - d], [&](const Segment& s) {
          find_cells(b, s, *state);
          A* g = state->value[i];
          load_row(a.dtype, a.grad_y, fine_at(b, i, s), s.n, static_cast<A>(stride(i)), g);
          state->cells.scatter(sums, 1, numel, s.n, [&](int64_t, int64_t x) { return g[x]; });
        });
        store_row(a.dtype, a.grad_flow, coarse_at(b, i), numel, A(1), sums);
      }
    });
  }
};

// Calls f(composer, flow in its storage type).
template <class A, class F>
inline void with_composer(const Compose& a, const F& f) {
  const Grid coarse = coarser(Grid{{a.S[0], a.S[1], a.S[2]}}, a.stride);
  with_geometry(a.d, coarse.numel(), [&](auto d, auto index) {
    const Composer<A, decltype(index), decltype(d)::value> composer(a);
    with_storage(a.dtype, [&](auto* type) { f(composer, static_cast<decltype(type)>(const_cast<void*>(a.flow))); });
  });
}

template <class A>
inline void compose_fwd(const Compose& a) {
  with_composer<A>(a, [](const auto& composer, const auto* flow) { composer.forward(flow); });
}

template <class A>
inline void compose_bwd(const Compose& a) {
  with_composer<A>(a, [](const auto& composer, const auto* flow) {
    composer.grad_residual(flow);
    composer.grad_flow();
  });
}

}  // namespace COVER_ISA
}  // namespace cover
