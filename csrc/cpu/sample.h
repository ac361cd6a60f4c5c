// Linear interpolation at the positions of a tile of voxels: the part that warp and compose, forward and backward,
// share.
//
// Positions are turned once into cells (the 2^d corners' indices and weights). A tile copies the box of the image that
// it reads into scratch, transposed, some channels at a time, and then reads or adds to all of them through the same
// cells. The box is an image of its own: cells are found in it as in any other. An image that lies in memory with its
// channels last is read, and added to, as it lies; one of few channels is read so.
namespace cover {
namespace COVER_ISA {

constexpr int64_t kTileVoxels = 4096;  // at most
constexpr int64_t kAhead = 32;         // voxels between a read of an image and the request for it

// Cells of the positions of a tile. Corner c takes bit i of c along axis i, the last axis lowest. Its weight is
// outer[c / 2] inner[c % 2].
template <class A, class I, int d>
struct Cells {
  static constexpr int kCorners = 1 << d;
  static constexpr int64_t kSize = kTileVoxels + 64 / sizeof(A);  // no power of two: lines in different sets of a cache
  using V = Channels<A>;
  using Mark = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Values[kSize];
  I first[kSize];                        // index of a cell's first voxel
  I corner[kCorners];                    // distance of each corner from it; 0 along an axis of one voxel
  Values outer[kCorners / 2], inner[2];  // of the weights; 0 outside the image
  Mark partial[kSize];                   // not 0 where some weight is 0
  int64_t count;                         // of cells
  Values part[d][2];                     // factors of the weights along each axis
  Values slope[d][2];                    // their derivatives

  A weight(int c, int64_t x) const { return outer[c / 2][x] * inner[c % 2][x]; }
  // Whether a corner counts in some derivative: one of those that do not may hold a NaN.
  bool moves(int c, int64_t x) const {
    for (int i = 0; i < d; i++) {
      A w = slope[i][bit(c, i)][x];
      for (int j = 0; j < d; j++)
        if (j != i) w *= part[j][bit(c, j)][x];
      if (w != A(0)) return true;
    }
    return false;
  }
  // The same for kWidth cells from x on.
  auto moving(int c, int64_t x) const {
    auto some = V{} != V{};
    for (int i = 0; i < d; i++) {
      V w = load_lanes<A>(slope[i][bit(c, i)] + x);
      for (int j = 0; j < d; j++)
        if (j != i) w *= load_lanes<A>(part[j][bit(c, j)] + x);
      some |= w != V{};
    }
    return some;
  }
  static constexpr int bit(int c, int i) { return c >> (d - 1 - i) & 1; }

  // position [d][n], in voxels of `grid` from `origin` on. With `border` it is clamped into the image, else corners
  // outside weigh 0. A NaN position gets NaN weights. Only kSlopes sets `part` and `slope`.
  template <bool kSlopes>
  void find(const Grid& grid, bool border, const Values* position, const int64_t* origin, int64_t n) {
    with_constant(border, [&](auto border) { find<kSlopes, border>(grid, position, origin, n); });
  }

  template <bool kSlopes, bool border>
  void find(const Grid& grid, const Values* position, const int64_t* origin, int64_t n) {
    constexpr int64_t lanes = kLanes<A>;
    typedef I Index __attribute__((vector_size(lanes * sizeof(I))));
    using Mask = decltype(Vec<A>{} < Vec<A>{});
    I stride[d];
    for (int64_t i = d - 1, s = 1; i >= 0; s *= grid.S[3 - d + i], i--) stride[i] = static_cast<I>(s);
    for (int c = 0; c < kCorners; c++) {
      corner[c] = 0;
      for (int i = 0; i < d; i++)
        if (grid.S[3 - d + i] > 1) corner[c] += bit(c, i) * stride[i];
    }
    count = n;
    const Vec<A> zero{}, one = splat(A(1));
    for (int64_t x = 0; x < n; x += lanes) {
      Index at{};
      Mask some_zero{};
      Vec<A> factor[d][2];
      for (int i = 0; i < d; i++) {
        const I size = static_cast<I>(grid.S[3 - d + i]), base_last = max<I>(0, size - 2);
        const A low = border ? A(0) : A(-1), high = border ? A(size - 1) : A(size);
        const Vec<A> p = load(position[i] + x) - static_cast<A>(origin[3 - d + i]);
        const Vec<A> clamped = p < low ? splat(low) : p > high ? splat(high) : p;
        const Vec<A> valid = clamped == clamped ? clamped : zero;
        Index base = __builtin_convertvector(valid, Index);
        Vec<A> to_first, to_second;  // slopes of the two factors
        if constexpr (border) {
          base = base > base_last ? Index{} + base_last : base;
          const Vec<A> fraction = clamped - __builtin_convertvector(base, Vec<A>);
          factor[i][0] = A(1) - fraction;
          factor[i][1] = size > 1 ? fraction : zero;
          const Vec<A> moves = (p >= low) & (p < high) ? one : zero;
          to_first = -moves, to_second = size > 1 ? moves : zero;
        } else {
          const Index floor = base + __builtin_convertvector(__builtin_convertvector(base, Vec<A>) > valid, Index);
          const Vec<A> fraction = clamped - __builtin_convertvector(floor, Vec<A>), rest = A(1) - fraction;
          base = floor < 0 ? Index{} : floor > base_last ? Index{} + base_last : floor;
          // the cell's floor is the first voxel of the pair, the second (past the last pair), or before the image
          const Mask usual = __builtin_convertvector(floor == base, Mask);
          const Mask before = __builtin_convertvector(floor < base, Mask);
          const Mask past = __builtin_convertvector((floor == base + 1) & (floor < size), Mask);
          const Vec<A> beyond = size > 1 ? one : zero, moves = (p >= low) & (p <= high) ? one : zero;
          factor[i][0] = usual ? rest : before ? fraction : zero;
          factor[i][1] = usual ? fraction * beyond : past ? rest : zero;
          to_first = usual ? -moves : before ? moves : zero;
          to_second = usual ? moves * beyond : past ? -moves : zero;
        }
        at += base * stride[i];
        if (kSlopes) {
          store(part[i][0] + x, factor[i][0]);
          store(part[i][1] + x, factor[i][1]);
          store(slope[i][0] + x, to_first);
          store(slope[i][1] + x, to_second);
        }
      }
      const auto keep = [&](A* to, Vec<A> w) {
        store(to + x, w);
        some_zero |= w == zero;
      };
      for (int c = 0; c < kCorners; c += 2) {
        Vec<A> w = factor[0][bit(c, 0)];
        for (int i = 1; i < d - 1; i++) w *= factor[i][bit(c, i)];
        keep(outer[c / 2], w);
      }
      for (int c = 0; c < 2; c++) keep(inner[c], factor[d - 1][c]);
      std::memcpy(first + x, &at, sizeof(at));
      std::memcpy(partial + x, &some_zero, sizeof(some_zero));
    }
  }

  // Asks for the last corner of a cell ahead of x: in memory rows of a cell are too far apart for a processor to see
  // what comes next. Rows that are a copy are in its caches.
  template <class T, class Count>
  COVER_INLINE void prefetch(const T* image, Count C, int64_t x) const {
    if constexpr (!std::is_same_v<Count, int64_t>) return;
    const T* const ahead = image + (int64_t(first[min(x + kAhead, count - 1)]) + corner[kCorners - 1]) * C;
    for (int64_t c = 0; c < C; c += 64 / sizeof(T)) __builtin_prefetch(ahead + c);
  }

  // out[x - begin] = image at cell x, for x in [begin, end), rows of C channels: image [*S, C], out [.., C], C a
  // multiple of kWidth.
  template <class T, class Count>
  void gather(const T* image, Count C, int64_t begin, int64_t end, T* out) const {
    const T* corners[kCorners];
    for (int c = 0; c < kCorners; c++) corners[c] = image + corner[c] * int64_t(C);
    for (int64_t x = begin; x < end; x++, out += C) {
      const int64_t cell = first[x] * int64_t(C);
      prefetch(image, C, x);
      for (int64_t c0 = 0; c0 < C; c0 += kWidth<A>) {
        V sum;
        const auto value = [&](int c) COVER_INLINE_LAMBDA { return load_lanes<A>(corners[c] + cell + c0); };
        if (partial[x]) {
          // -0.0 changes no sum, and a corner of weight 0 adds nothing: a cell on a voxel returns its very bits
          sum = -V{};
          for (int c = 0; c < kCorners; c++)
            if (const A w = weight(c, x); w != A(0)) sum += w * value(c);
        } else {
          V side[2] = {outer[0][x] * value(0), outer[0][x] * value(1)};
          for (int c = 2; c < kCorners; c++) side[c % 2] += outer[c / 2][x] * value(c);
          sum = side[0] * inner[0][x] + side[1] * inner[1][x];
        }
        store_lanes<A>(out + c0, sum);
      }
    }
  }

  // out[x - begin] = a channel [*S] of the image at cell x, for x in [begin, end) and, of no use, up to the next
  // multiple of kWidth.
  template <class T>
  void gather_channel(const T* channel, int64_t begin, int64_t end, A* out) const {
    for_pairs(channel, begin, end, [&](int64_t x, auto careful, const auto& load) COVER_INLINE_LAMBDA {
      V side[2] = {-V{}, -V{}};
      unroll<kCorners / 2>([&](auto r) COVER_INLINE_LAMBDA {
        V value[2];
        load(r, value);
        for (int i = 0; i < 2; i++) {
          V w = load_lanes<A>(outer[r] + x);
          if (careful) w *= load_lanes<A>(inner[i] + x);
          const V more = side[i] + w * value[i];
          side[i] = !careful || w != V{} ? more : side[i];  // as above
        }
      });
      for (int i = 0; !careful && i < 2; i++) side[i] *= load_lanes<A>(inner[i] + x);
      store_lanes<A>(out + (x - begin), side[0] + side[1]);
    });
  }

  // image += g[x - begin] at cell x, for x in [begin, end): the transpose of `gather`, for the voxels of the image that
  // owns(voxel) says.
  template <class T, class Count, class Owns>
  void scatter(A* image, Count C, int64_t begin, int64_t end, const T* g, const Owns& owns) const {
    A* corners[kCorners];
    for (int c = 0; c < kCorners; c++) corners[c] = image + corner[c] * int64_t(C);
    for (int64_t x = begin; x < end; x++, g += C) {
      prefetch(image, C, x);
      A w[kCorners];
      for (int c = 0; c < kCorners; c++) w[c] = weight(c, x);
      for (int c = 0; c < kCorners; c++) {
        if (!owns(int64_t(first[x]) + corner[c]) || (partial[x] && w[c] == A(0))) continue;
        A* const to = corners[c] + first[x] * int64_t(C);
        for (int64_t c0 = 0; c0 < C; c0 += kWidth<A>)
          store_lanes<A>(to + c0, load_lanes<A>(to + c0) + w[c] * load_lanes<A>(g + c0));
      }
    }
  }

  // grad[i][x] += sum over channels of g[x - begin] * the image's derivative along axis i at cell x, for x in
  // [begin, end) and, of no use, up to the next multiple of kWidth.
  template <class T, class Count>
  void position_gradient(const T* image, Count C, int64_t begin, int64_t end, const T* g, Values* grad) const {
    constexpr int64_t W = kWidth<A>;
    const T* corners[kCorners];
    for (int c = 0; c < kCorners; c++) corners[c] = image + corner[c] * int64_t(C);
    for (int64_t x0 = begin; x0 < end; x0 += W) {
      V term[d][W];
      if (x0 + W > end) std::memset(term, 0, sizeof(term));
      for (int64_t x = x0; x < min(x0 + W, end); x++, g += C) {
        const int64_t cell = first[x] * int64_t(C);
        prefetch(image, C, x);
        bool absent[kCorners];
        for (int c = 0; partial[x] && c < kCorners; c++) absent[c] = !moves(c, x);
        for (int64_t c0 = 0; c0 < C; c0 += W) {
          V value[kCorners], derivative[d][kCorners / 2];
          for (int c = 0; c < kCorners; c++) value[c] = load_lanes<A>(corners[c] + cell + c0);
          for (int c = 0; partial[x] && c < kCorners; c++)
            if (absent[c]) value[c] = V{};
          // interpolation along the last axis first; the derivatives go along with it
          for (int i = d - 1; i >= 0; i--)
            for (int k = 0; k < 1 << i; k++) {
              const A p0 = part[i][0][x], p1 = part[i][1][x];
              for (int j = i + 1; j < d; j++)
                derivative[j][k] = p0 * derivative[j][2 * k] + p1 * derivative[j][2 * k + 1];
              derivative[i][k] = slope[i][0][x] * value[2 * k] + slope[i][1][x] * value[2 * k + 1];
              value[k] = p0 * value[2 * k] + p1 * value[2 * k + 1];
            }
          for (int i = 0; i < d; i++) {
            const V product = derivative[i][0] * load_lanes<A>(g + c0);
            term[i][x - x0] = c0 == 0 ? product : term[i][x - x0] + product;
          }
        }
      }
      for (int i = 0; i < d; i++) add_channels<A>(term[i], grad[i] + x0);
    }
  }

  // grad[i][x] += g[x - begin] * the derivative of a channel [*S] along axis i at cell x, for x in [begin, end) and, of
  // no use, up to the next multiple of kWidth.
  template <class T>
  void channel_gradient(const T* channel, int64_t begin, int64_t end, const A* g, Values* grad) const {
    for_pairs(channel, begin, end, [&](int64_t x, auto careful, const auto& load) COVER_INLINE_LAMBDA {
      V value[kCorners], derivative[d][kCorners / 2];
      unroll<kCorners / 2>([&](auto r) COVER_INLINE_LAMBDA { load(r, value + 2 * r); });
      for (int c = 0; careful && c < kCorners; c++) value[c] = moving(c, x) ? value[c] : V{};
      // as above
      unroll<d>([&](auto done) COVER_INLINE_LAMBDA {
        constexpr int i = d - 1 - done;
        const V p0 = load_lanes<A>(part[i][0] + x), p1 = load_lanes<A>(part[i][1] + x);
        const V s0 = load_lanes<A>(slope[i][0] + x), s1 = load_lanes<A>(slope[i][1] + x);
        unroll<1 << i>([&](auto k) COVER_INLINE_LAMBDA {
          for (int j = i + 1; j < d; j++) derivative[j][k] = p0 * derivative[j][2 * k] + p1 * derivative[j][2 * k + 1];
          derivative[i][k] = s0 * value[2 * k] + s1 * value[2 * k + 1];
          value[k] = p0 * value[2 * k] + p1 * value[2 * k + 1];
        });
      });
      for (int i = 0; i < d; i++)
        store_lanes<A>(grad[i] + x, load_lanes<A>(grad[i] + x) + derivative[i][0] * load_lanes<A>(g + (x - begin)));
    });
  }

  // Calls f(x, whether any of them has a weight of 0, load) for cells x, x + kWidth, .. in [begin, end): kWidth of them
  // at a time. load(r, side) brings their values in a channel [*S] at corners 2 r and 2 r + 1.
  template <class T, class F>
  COVER_INLINE void for_pairs(const T* channel, int64_t begin, int64_t end, const F& f) const {
    const T* rows[kCorners / 2];
    for (int r = 0; r < kCorners / 2; r++) rows[r] = channel + corner[2 * r];
    const auto all = [&](auto next) COVER_INLINE_LAMBDA {
      for (int64_t x = begin; x < end; x += kWidth<A>)
        with_constant(any(load_as<Lanes<Mark, kWidth<A>>>(partial + x)), [&](auto careful) COVER_INLINE_LAMBDA {
          f(x, careful, [&](int r, V* side) COVER_INLINE_LAMBDA {
            load_pairs<A>(rows[r], first + x, next, side, std::make_index_sequence<kWidth<A>>());
          });
        });
    };
    corner[1] == 1 ? all(std::integral_constant<int, 1>()) : all(corner[1]);
  }
};

constexpr int64_t kSegment = 512;  // voxels of a tile along W, at most

// Voxels x0 .. x0 + n of line (z, y).
struct Segment {
  int64_t z, y, x0, n;
};

// A range of an image's voxels in array order.
struct Range {
  int64_t begin, end;
};

// A thread's working memory: a tile of positions, and a few channels of what it reads.
template <class A, class I, int d>
struct Tile {
  using C = Cells<A, I, d>;
  using V = Channels<A>;
  Box part;                        // the voxels of the tile
  Grid image;                      // what they are positions in
  Box box;                         // the part of it that they read
  bool whole;                      // whether `copy` is that box; else it is the corners of each cell, which are fewer
  typename C::Values position[d];  // line after line
  typename C::Values grad[d];      // with respect to the positions, where a backward wants it
  C cells;
  I first[C::kSize];      // of the cells in the image, and
  I corner[C::kCorners];  //   their corners' distances, where `copy` is the corners of each cell
  V copy[C::kCorners * kTileVoxels];
  V line[kSegment];  // the same channels of a line of the tile

  // Voxels from line to line, a multiple of kWidth, and in all.
  int64_t pitch() const { return round_up(part.grid.S[2], kWidth<A>); }
  int64_t numel() const { return part.grid.S[0] * part.grid.S[1] * pitch(); }

  // Calls f(segment, index of its first voxel in the tile) for the lines of the tile.
  template <class F>
  void for_lines(const F& f) const {
    int64_t first = 0;
    for (int64_t z = part.low[0]; z < part.low[0] + part.grid.S[0]; z++)
      for (int64_t y = part.low[1]; y < part.low[1] + part.grid.S[1]; y++, first += pitch())
        f(Segment{z, y, part.low[2], part.grid.S[2]}, first);
  }

  // To be called once the positions of all lines, in `grid`, are set; sets those between lines.
  void complete(const Grid& grid) {
    image = grid;
    const int64_t n = part.grid.S[2];
    for (int64_t first = 0; n < pitch() && first < numel(); first += pitch())
      for (int i = 0; i < d; i++) fill(position[i] + first + n, pitch() - n, position[i][first]);
  }

  // Sets `box`.
  void enclose() {
    Extent<A> extent[d];
    for (int i = 0; i < d; i++) {
      extent[i] = {splat(kInf<A>), splat(-kInf<A>)};
      extent[i].add(position[i], numel());
    }
    box = box_around(image, extent, d);
    whole = box.numel() <= C::kCorners * numel();
  }

  // Whether cells may have corners in a range of the image.
  bool reads(const Range& range) const {
    return !whole || (index(0, 0) < range.end && index(box.grid.S[0] - 1, box.grid.S[1] - 1) >= range.begin);
  }

  // Sets `cells`, after `enclose`.
  template <bool kSlopes>
  void find_cells(bool border) {
    const int64_t origin[3] = {0, 0, 0};
    cells.template find<kSlopes>(whole ? box.grid : image, border, position, whole ? box.low : origin, numel());
    if (whole) return;
    std::memcpy(corner, cells.corner, sizeof(corner));
    for (int c = 0; c < C::kCorners; c++) cells.corner[c] = c;
    for (int64_t x = 0; x < numel(); x++) first[x] = cells.first[x], cells.first[x] = static_cast<I>(x * C::kCorners);
  }

  // Sets `cells` to those of the image itself, for images that lie in memory with their channels last.
  template <bool kSlopes>
  void find_cells_in_image(bool border) {
    const int64_t origin[3] = {0, 0, 0};
    cells.template find<kSlopes>(image, border, position, origin, numel());
  }

  // Channels of `copy` and `line` as numbers: [.., kWidth].
  using Width = std::integral_constant<int64_t, kWidth<A>>;
  static A* values(V* v) { return reinterpret_cast<A*>(v); }

  // line = `copy` at cells [begin, end).
  void gather(int64_t begin, int64_t end) { cells.gather(values(copy), Width(), begin, end, values(line)); }

  // grad += the derivative of `copy` at cells [begin, end) times `line`.
  void position_gradient(int64_t begin, int64_t end) {
    cells.position_gradient(values(copy), Width(), begin, end, values(line), grad);
  }

  // copy += `line` at cells [begin, end).
  void scatter(int64_t begin, int64_t end) {
    const auto all = [](int64_t) { return true; };
    cells.scatter(values(copy), Width(), begin, end, values(line), all);
  }

  // copy = `channels` <= kWidth channels of an image [.., *S].
  template <class T>
  void load(const T* x, int64_t channels) {
    for_copied([&](int64_t at, int64_t n, V* row) { to_channels_last<A>(x + at, image.numel(), channels, n, row); });
  }

  void clear() {
    for_copied([&](int64_t, int64_t n, V* row) { std::memset(row, 0, n * sizeof(V)); });
  }

  // Adds `copy` to as many channels of the image, within a range of it: sums[c * stride + i - range.begin].
  void add_to(A* sums, int64_t stride, const Range& range, int64_t channels) {
    for_copied([&](int64_t at, int64_t n, const V* row) {
      if (at >= range.begin && at < range.end) add_channels_first<A>(row, stride, channels, n, sums + at - range.begin);
    });
  }

 private:
  int64_t index(int64_t z, int64_t y) const {
    return ((box.low[0] + z) * image.S[1] + box.low[1] + y) * image.S[2] + box.low[2];
  }

  // Calls f(index in the image, number of voxels, where they are in `copy`) for all rows of what is copied.
  template <class F>
  void for_copied(const F& f) {
    V* row = copy;
    if (whole) {
      for (int64_t z = 0; z < box.grid.S[0]; z++)
        for (int64_t y = 0; y < box.grid.S[1]; y++, row += box.grid.S[2]) f(index(z, y), box.grid.S[2], row);
    } else {
      for (int64_t x = 0; x < numel(); x++)
        for (int c = 0; c < C::kCorners; c++, row++) f(first[x] + corner[c], 1, row);
    }
  }
};

// By how many voxels displacements along H differ, of the first component of B flows [B, 2, *grid] that are `stride`
// voxels apart. Every eighth line of voxels is looked at, which is near enough to choose tiles.
template <class A, class T>
inline A spread(const T* flow, int64_t B, const Grid& grid, int64_t stride) {
  Extent<A> extent{splat(kInf<A>), splat(-kInf<A>)};
  A numbers[kSegment];
  for (int64_t b = 0; b < B; b++)
    for (int64_t y = 0; y < grid.S[1]; y += max<int64_t>(1, 8 / stride))
      for (int64_t x = 0; x < grid.S[2]; x += kSegment) {
        const int64_t n = min(kSegment, grid.S[2] - x);
        const T* const row = flow + (b * 2 * grid.S[1] + y) * grid.S[2] + x;
        for (int64_t i = 0; i < n; i++) numbers[i] = static_cast<A>(row[i]);
        extent.add(numbers, n);
      }
  return extent.high() - extent.low();
}

// A grid cut into tiles, in array order. Long rows are read and written as a stream: in 2D a tile is as wide as the box
// allows that it reads, by the `spread` of the displacements.
template <int d>
struct Tiling {
  Grid grid, tile, tiles;

  Tiling(const Grid& grid, double spread) : grid(grid), tile{{8, 8, 64}} {
    for (int64_t n = quotient(grid.S[2], kSegment); d == 2; n++) {
      const int64_t width = round_up(quotient(grid.S[2], n), 16), height = min<int64_t>(64, kTileVoxels / width);
      tile = {{1, quotient(grid.S[1], quotient(grid.S[1], height)), width}};
      // a box of at most about 4 times the tile
      if (width <= 64 || spread <= 3.0 * static_cast<double>(height)) break;
    }
    for (int i = 0; i < 3; i++) tiles.S[i] = quotient(grid.S[i], tile.S[i]);
  }
  static int64_t quotient(int64_t n, int64_t by) { return (n + by - 1) / by; }  // rounded up
  int64_t count() const { return tiles.numel(); }
  Box operator[](int64_t i) const {
    const int64_t at[3] = {i / (tiles.S[1] * tiles.S[2]), i / tiles.S[2] % tiles.S[1], i % tiles.S[2]};
    Box part;
    for (int axis = 0; axis < 3; axis++) {
      part.low[axis] = at[axis] * tile.S[axis];
      part.grid.S[axis] = min(tile.S[axis], grid.S[axis] - part.low[axis]);
    }
    return part;
  }
};

constexpr int64_t kSums = 1 << 20;  // of half precision that a thread holds at a time, unless one line is more

// The gradient of an image [B, C, *S] in T that was sampled in tiles: place(b, box, tile) sets a tile's positions, and
// load(b, first channel, channels, segment, dst) the gradient of what was sampled in a segment.
//
// Each thread owns rows of voxels, and adds all that falls there, tile after tile. Tiles that read rows of several
// owners are worked on by each of them, so that a sum does not depend on who owns it.
template <class T, class I, int d, class Place, class Load>
inline void image_gradient(int64_t B, int64_t C, const Grid& image, const Tiling<d>& tiles, bool border, T* grad,
                           const Place& place, const Load& load) {
  using A = Acc<T>;
  constexpr int64_t W = kWidth<A>;
  // half precision is added up in float, a few rows at a time
  constexpr bool kDirect = std::is_same_v<T, A>;
  const int64_t blocks = (C + W - 1) / W, row = image.S[2], outer = image.numel() / row;
  parallel_for(B * blocks * outer, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Tile<A, I, d>> tile(new Tile<A, I, d>);
    while (begin < end) {
      const int64_t b = begin / (blocks * outer), block = begin / outer % blocks, first = begin % outer;
      const int64_t rows = min(min(outer - first, end - begin), kDirect ? outer : max<int64_t>(1, kSums / (W * row)));
      // all blocks of channels that are owned whole go through the same cells
      const int64_t together = kDirect && rows == outer ? min(blocks - block, (end - begin) / outer) : 1;
      const int64_t c0 = block * W, channels = min(together * W, C - c0);
      const Range range{first * row, (first + rows) * row};
      T* const own = grad + (b * C + c0) * image.numel() + range.begin;
      Scratch<A> memory(kDirect ? 0 : channels * rows * row);
      A* const sums = kDirect ? reinterpret_cast<A*>(own) : memory.take(channels * rows * row);
      const int64_t stride = kDirect ? image.numel() : rows * row;
      for (int64_t c = 0; c < channels; c++) fill(sums + c * stride, rows * row, A(0));
      for (int64_t i = 0; i < tiles.count(); i++) {
        place(b, tiles[i], *tile);
        tile->enclose();
        if (!tile->reads(range)) continue;
        tile->template find_cells<false>(border);
        for (int64_t c = 0; c < channels; c += W) {
          const int64_t n = min(W, channels - c);
          tile->clear();
          tile->for_lines([&](const Segment& s, int64_t at) {
            load(b, c0 + c, n, s, tile->line);
            tile->scatter(at, at + s.n);
          });
          tile->add_to(sums + c * stride, stride, range, n);
        }
      }
      if (!kDirect)
        for (int64_t c = 0; c < channels; c++)
          for (int64_t x = 0; x < rows * row; x++) own[c * image.numel() + x] = static_cast<T>(sums[c * stride + x]);
      begin += together * rows;
    }
  });
}

// The grid that is coarser by a stride.
inline Grid coarser(const Grid& g, const int64_t* stride) {
  return {{g.S[0] / stride[0], g.S[1] / stride[1], g.S[2] / stride[2]}};
}

// Where a position of a level lies on the level that is coarser by `stride`.
template <class A>
inline A coarse_position(A p, int64_t stride) {
  return stride == 1 ? p : (p + A(0.5)) / static_cast<A>(stride) - A(0.5);
}

// Makes n positions those on the coarser level. A power of two is divided by as exactly, and faster, by multiplying.
template <class A>
inline void to_coarse(A* position, int64_t n, int64_t stride) {
  if (stride == 1) return;
  const A factor = A(1) / static_cast<A>(stride);
  if (stride & (stride - 1))
    for (int64_t x = 0; x < n; x++) position[x] = coarse_position(position[x], stride);
  else
    for (int64_t x = 0; x < n; x++) position[x] = (position[x] + A(0.5)) * factor - A(0.5);
}

// Neighbours and fraction of a voxel's position on a coarser level, along one axis, clamped at the border.
template <class A>
struct Between {
  int64_t i0, i1;
  A fraction;
  Between(int64_t p, int64_t stride, int64_t size) {
    A c = coarse_position(static_cast<A>(p), stride);
    c = max(A(0), min(static_cast<A>(size - 1), c));
    i0 = static_cast<int64_t>(c);
    i1 = min(i0 + 1, size - 1);
    fraction = c - static_cast<A>(i0);
  }
};

// Calls f with the spatial dimension, and with the narrowest index type that addresses a channel.
template <class F>
inline void with_geometry(int64_t d, int64_t numel, const F& f) {
  const bool narrow = numel < std::numeric_limits<int32_t>::max();
  if (d == 2)
    narrow ? f(std::integral_constant<int, 2>(), int32_t()) : f(std::integral_constant<int, 2>(), int64_t());
  else
    narrow ? f(std::integral_constant<int, 3>(), int32_t()) : f(std::integral_constant<int, 3>(), int64_t());
}

}  // namespace COVER_ISA
}  // namespace cover
