// Vectors as wide as the instruction set's registers, rows in any storage type, and a base-2 exponential.
//
// Included once per instruction set with COVER_ISA (a namespace) and COVER_BYTES (a register's width) defined, after
// every standard header: those must be compiled for the baseline.
namespace cover {
namespace COVER_ISA {

// A vector of L numbers. A typedef in a struct, since an alias template cannot carry the attribute in every compiler.
template <class A, int64_t L>
struct LanesOf {
  typedef A type __attribute__((vector_size(L * sizeof(A))));
};
template <class A, int64_t L>
using Lanes = typename LanesOf<A, L>::type;
template <class A>
constexpr int64_t kLanes = COVER_BYTES / sizeof(A);
template <class A>
using Vec = Lanes<A, kLanes<A>>;

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

// A number whose bits are all set.
template <class A>
inline A all_bits() {
  A a;
  std::memset(&a, 0xff, sizeof(a));
  return a;
}

template <class A>
constexpr A kInf = std::numeric_limits<A>::infinity();

template <class A>
COVER_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class A>
COVER_INLINE V load_as(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A, class V>
COVER_INLINE void store(A* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// Loads once what several instructions use: g++ makes each of them load it again.
template <class A>
COVER_INLINE Vec<A> load_once(const A* p) {
  Vec<A> v = load(p);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The vector at p + o. One of 64 bytes comes from the two at p and beside it, which begin cache lines where p does: a
// load across lines takes the time of two.
template <int o, class A>
COVER_INLINE Vec<A> load_beside(const A* p) {
#if COVER_BYTES == 64
  if constexpr (o != 0 && sizeof(A) == 4) {
    const __m512i low = _mm512_loadu_si512(o < 0 ? p - 16 : p), high = _mm512_loadu_si512(o < 0 ? p : p + 16);
    return (Vec<A>)_mm512_alignr_epi32(high, low, o & 15);
  }
#endif
  return load_once(p + o);
}

template <class A>
inline Vec<A> splat(A a) {
  return Vec<A>{} + a;
}

// Calls f with the constants 0..N - 1: a loop that leaves no index behind, so that arrays of vectors stay in registers.
template <int... I, class F>
COVER_INLINE void unroll(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
COVER_INLINE void unroll(const F& f) {
  unroll(std::make_integer_sequence<int, N>(), f);
}

// Calls f with a condition as a constant.
template <class F>
COVER_INLINE void with_constant(bool condition, const F& f) {
  condition ? f(std::true_type()) : f(std::false_type());
}

// a > b ? a : b, and so b where one is NaN: one instruction, which compilers do not see where a is a constant.
template <class V>
COVER_INLINE V larger(V a, V b) {
#if COVER_BYTES == 64
  if constexpr (sizeof(a[0]) == 4 && sizeof(V) == 64) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if COVER_BYTES >= 32
  if constexpr (sizeof(a[0]) == 4 && sizeof(V) == 32) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// The largest element of a vector, which holds no NaN and none below 0.
template <class A, class V>
inline A largest(V v) {
  A most = 0;
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); i++) most = max(most, v[i]);
  return most;
}

// v where all bits of *p are set, 0 where none is.
template <class A>
COVER_INLINE Vec<A> where_set(Vec<A> v, const A* p) {
  using Bits = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
  return (Vec<A>)((Bits)v & load_as<Bits>(p));
}

// Whether any element of a comparison is true.
template <class M>
COVER_INLINE bool any(M m) {
#if COVER_BYTES == 64
  if constexpr (sizeof(m) == 64) return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#endif
#if COVER_BYTES >= 32
  if constexpr (sizeof(m) == 32) return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#endif
  bool found = false;
  for (size_t i = 0; i < sizeof(m) / sizeof(m[0]); i++) found |= m[i] != 0;
  return found;
}

#if COVER_BYTES == 64
// Element (i & 31) of 32 numbers, for every i.
COVER_INLINE Vec<int32_t> lookup(const int32_t* table, Vec<int32_t> i) {
  return (Vec<int32_t>)_mm512_permutex2var_epi32(_mm512_load_si512(table), (__m512i)i, _mm512_load_si512(table + 16));
}

// 2^(i / 32) as bits, less i << 18: adding n << 18, with i the low five bits of n, gives 2^(n / 32).
alignas(64) constexpr int32_t kExp2Table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
#endif

inline __attribute__((noinline)) Vec<double> exp2_of_doubles(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; i++) x[i] = ::exp2(x[i]);
  return x;
}

// 2^x for |x| < 126, relative error below 1.6e-7; exactly 1 at 0; NaN stays NaN. All of it is a product of two factors,
// so that a NaN survives whatever the bits of the other one.
template <class V>
COVER_INLINE V exp2_within(V x) {
  if constexpr (sizeof(x[0]) == sizeof(double)) {
    return exp2_of_doubles(x);
  } else {
    using Bits = Lanes<int32_t, sizeof(V) / sizeof(float)>;
#if COVER_BYTES == 64
    // 2^(n / 32) from a table, which is looked up where no multiply-add is done, and a short polynomial
    const float shift = 0x1.8p18f;  // adding it leaves n = round(32 x) in the low bits
    const V shifted = x + shift, r = x - (shifted - shift);
    const V p = (r * 0x1.ebfbdep-3f + 0x1.62e584p-1f) * r + 1.0f;
    return p * (V)(lookup(kExp2Table, (Bits)shifted) + ((Bits)shifted << 18));
#else
    const float shift = 0x1.8p23f;  // adding it leaves round(x) in the low bits
    const V shifted = x + shift, r = x - (shifted - shift);
    V p = V{} + 0x1.5bba14p-10f;
    p = p * r + 0x1.3cea88p-7f;
    p = p * r + 0x1.c6b752p-5f;
    p = p * r + 0x1.ebf9bcp-3f;
    p = p * r + 0x1.62e42ap-1f;
    p = p * r + 1.0f;
    return p * (V)(((Bits)shifted + 127) << 23);
#endif
  }
}

// The same for any x < 127: 0 from -127 down, and between there and -126 some number below 2^-126.
template <class V>
COVER_INLINE V exp2(V x) {
  return exp2_within(sizeof(x[0]) == sizeof(double) ? x : larger(V{} - 127, x));
}

// log2(x) for x >= 2^-126: exponent and a polynomial of the mantissa (within 1e-04), then a step of Newton's on 2^y =
// x.
inline Vec<float> log2(Vec<float> x) {
  using Bits = Lanes<int32_t, kLanes<float>>;
  const Vec<float> exponent = __builtin_convertvector(((Bits)x >> 23) - 127, Vec<float>);
  const Vec<float> m = (Vec<float>)(((Bits)x & 0x7fffff) | 127 << 23) - 1.0f;
  Vec<float> y = exponent + m * (0x1.706344p+0f + m * (-0x1.5c21a4p-1f + m * (0x1.4d68fep-2f + m * -0x1.5b3672p-4f)));
  y += (x * exp2(-y) - 1.0f) * 0x1.715476p0f;
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

// A vector of numbers of any storage type.
template <class A, class T>
inline Vec<A> load_converted(const T* p) {
  if constexpr (std::is_same_v<A, T>) return load(p);
  A a[kLanes<A>];
  for (int64_t i = 0; i < kLanes<A>; i++) a[i] = static_cast<A>(p[i]);
  return load(a);
}

// The first n of them, n <= kLanes<A>, and zeros; and what stores the first n of a vector.
template <class A, class T>
COVER_INLINE Vec<A> load_part(const T* p, int64_t n) {
#if COVER_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Vec<A>)_mm512_maskz_loadu_ps((1 << n) - 1, p);
#endif
  T part[kLanes<A>] = {};
#if COVER_BYTES == 64
  if constexpr (sizeof(T) == 2 && sizeof(part) == 32)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16((1 << n) - 1, p));
  else
#endif
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load_converted<A>(part);
}
template <class A>
COVER_INLINE void store_part(A* p, Vec<A> v, int64_t n) {
#if COVER_BYTES == 64
  if constexpr (std::is_same_v<A, float>) return _mm512_mask_storeu_ps(p, (1 << n) - 1, (__m512)v);
#endif
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
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
