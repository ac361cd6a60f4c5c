// Vectors as wide as the instruction set's registers, rows in any storage type, and a base-2 exponential.
//
// Included once per instruction set with COVER_ISA (a namespace) and COVER_BYTES (a register's width) defined, after
// every standard header: those must be compiled for the baseline.
namespace cover {
namespace COVER_ISA {

// A typedef in a struct, since an alias template cannot carry the attribute in every compiler.
template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(COVER_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int64_t kLanes = COVER_BYTES / sizeof(A);

// Not std::min and std::max: an out-of-line copy of those, compiled here for a wide instruction set, could be the one
// that the linker keeps for the whole library. For the same reason there are no standard containers in these files.
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A thread's working memory, carved into arrays that start at multiples of 64 bytes.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(static_cast<char*>(::malloc(n * sizeof(A) + 64 * 32))) {
    if (!memory_) throw std::bad_alloc();
    next_ = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Scratch() { ::free(memory_); }
  Scratch(const Scratch&) = delete;
  A* take(int64_t n) {
    A* p = next_;
    next_ += round_up(n, 64 / sizeof(A));
    return p;
  }

 private:
  char* memory_;
  A* next_;
};

template <class A>
inline void fill(A* p, int64_t n, A value) {
  for (int64_t i = 0; i < n; i++) p[i] = value;
}

template <class A>
constexpr A kInf = std::numeric_limits<A>::infinity();

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class A>
inline Vec<A> splat(A a) {
  return Vec<A>{} + a;
}

// a[0], b[0], a[1], b[1], ..
template <class A, size_t... J>
inline void store_pairs(A* p, Vec<A> a, Vec<A> b, std::index_sequence<J...>) {
#if __has_builtin(__builtin_shufflevector)
  constexpr size_t half = sizeof...(J) / 2, n = sizeof...(J);
  store(p, __builtin_shufflevector(a, b, (J / 2 + J % 2 * n)...));
  store(p + n, __builtin_shufflevector(a, b, (half + J / 2 + J % 2 * n)...));
#else
  ((p[2 * J] = a[J], p[2 * J + 1] = b[J]), ...);
#endif
}
template <class A>
inline void store_pairs(A* p, Vec<A> a, Vec<A> b) {
  store_pairs(p, a, b, std::make_index_sequence<kLanes<A>>());
}

// 2^x for x <= 0, minimax polynomial with p(0) = 1: relative error below 1.6e-7; 0 below -126; NaN stays NaN.
inline Vec<float> exp2(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(COVER_BYTES)));
  const float shift = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  Vec<float> shifted = x + shift;
  Vec<float> r = x - (shifted - shift);
  Vec<float> p = splat(0x1.5bba14p-10f);
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  // a product, not an addition to the exponent bits, so that a NaN survives
  Vec<float> y = p * (Vec<float>)(((Bits)shifted + 127) << 23);
  return x < -126.0f ? splat(0.0f) : y;
}

inline Vec<double> exp2(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; i++) x[i] = ::exp2(x[i]);
  return x;
}

// log2(x) for x >= 1: a guess from the exponent's bits (within 0.09), then Newton's method on 2^y = x.
inline Vec<float> log2(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(COVER_BYTES)));
  Vec<float> y = __builtin_convertvector((Bits)x - (127 << 23), Vec<float>) * 0x1p-23f;
  for (int i = 0; i < 3; i++) y += (x * exp2(-y) - 1.0f) * 0x1.715476p0f;
  return x == kInf<float> ? x : y;
}

inline Vec<double> log2(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; i++) x[i] = ::log2(x[i]);
  return x;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  BFloat16() = default;
  explicit BFloat16(float f) {
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    // to nearest, ties to even; a NaN keeps its sign and becomes quiet
    bits = f != f ? static_cast<uint16_t>(wide >> 16 | 0x40)
                  : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};
#if defined(__aarch64__)
using Half = __fp16;  // g++ knows _Float16 there only from version 13 on
#else
using Half = _Float16;
#endif

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64: return f(static_cast<double*>(nullptr));
    case Dtype::f32: return f(static_cast<float*>(nullptr));
    case Dtype::bf16: return f(static_cast<BFloat16*>(nullptr));
    case Dtype::f16: return f(static_cast<Half*>(nullptr));
  }
}

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// dst[0..n) = factor * src[first..first + n)
template <class A>
inline void load_row(Dtype dtype, const void* src, int64_t first, int64_t n, A factor, A* dst) {
  with_storage(dtype, [&](auto* type) {
    auto* p = static_cast<const std::remove_pointer_t<decltype(type)>*>(src) + first;
    for (int64_t i = 0; i < n; i++) dst[i] = factor * static_cast<A>(p[i]);
  });
}

// dst[first..first + n) = factor * src[0..n)
template <class A>
inline void store_row(Dtype dtype, void* dst, int64_t first, int64_t n, A factor, const A* src) {
  with_storage(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* p = static_cast<T*>(dst) + first;
    for (int64_t i = 0; i < n; i++) p[i] = static_cast<T>(factor * src[i]);
  });
}

}  // namespace COVER_ISA
}  // namespace cover
