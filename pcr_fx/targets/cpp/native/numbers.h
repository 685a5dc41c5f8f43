// Scalar functions for one number or a vector of them, and what templates over both need.
// REAL is float or double. Every function passes NaN on, and takes and gives infinities and zeros of either sign, as PyTorch's
// does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE_MEMBER inline ALWAYS_INLINE
#define INLINE static inline ALWAYS_INLINE
// What is long enough for a call to cost nothing, and would be compiled over and over if it were inlined.
#define OUTLINE_MEMBER __attribute__((noinline))
#define OUTLINE static OUTLINE_MEMBER
#define RESTRICT __restrict__
#define UNROLL _Pragma("GCC unroll 8")

// Closed behind the drivers. Many chains are loaded into one process, with a `Body` each: a linker that took two of them for the
// same, as it does for what templates and inline variables leave behind, would give one chain the sizes of another.
namespace {

using real = REAL;
using integer = std::conditional_t<sizeof(real) == 4, int32_t, int64_t>;
// As wide as a register: compilers do not hold a wider vector in several, but in memory, a tenth as fast.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES)));
constexpr int k_lanes = VECTOR_BYTES / sizeof(real);
constexpr bool k_single = sizeof(real) == 4;
// Whether a call has one tile, so that what samples share is nobody else's.
constexpr bool k_alone = ALONE;

template <class V> constexpr bool k_is_vector = !std::is_same_v<V, real>;
// Sums of `size` that are kept in registers at a time where each lane is a sample: enough to hide the latency of a
// multiply-add, and none left over if that can be.
template <class V> constexpr int k_unrolled(int size) {
  if (!k_is_vector<V>) return 1;
  for (int many = 8; many > 4; --many)
    if (size % many == 0) return many;
  return size < 4 ? 1 : 4;
}
template <class V> using whole = std::conditional_t<k_is_vector<V>, ivec, integer>;
template <class... A> using wide = std::conditional_t<(k_is_vector<A> || ...), vec, real>;

// A vector of one number. `a - 0` is `a`, where `a + 0` would lose the sign of a zero.
template <class V, class A> INLINE V k_fill(A a) {
  if constexpr (k_is_vector<V> && !k_is_vector<A>) return a - V{}; else return a;
}
template <class V, class A> INLINE void k_set(V& place, A value) { place = k_fill<V>(value); }
template <class V, class A> INLINE void k_add(V& place, A value) { place = place + k_fill<V>(value); }
// The first of some that are added, to what is zero so far; with one tile there is no need to have put it there.
template <class V, class A> INLINE void k_begin(V& place, A value) {
  if constexpr (k_alone) place = k_fill<V>(real(0)) + k_fill<V>(value); else k_add(place, value);
}

// All bits set in the first `count` lanes.
INLINE ivec k_first_lanes(int64_t count) {
  ivec lane;
  for (int w = 0; w < k_lanes; ++w) lane[w] = w;
  return lane < (ivec{} + integer(count));
}
INLINE vec k_select(ivec where, vec yes, vec no) { return (vec)(((ivec)yes & where) | ((ivec)no & ~where)); }

// `x` with the sign of `of`.
template <class V> INLINE V k_with_sign(V x, V of) {
  if constexpr (k_is_vector<V>) {
    const ivec sign = (ivec)(-V{});
    return (V)(((ivec)x & ~sign) | ((ivec)of & sign));
  } else {
    return std::copysign(x, of);
  }
}

template <class V> INLINE whole<V> k_to_whole(V x) {
  if constexpr (k_is_vector<V>) return __builtin_convertvector(x, ivec); else return integer(x);
}
template <class V> INLINE V k_to_real(whole<V> n) {
  if constexpr (k_is_vector<V>) return __builtin_convertvector(n, vec); else return real(n);
}
template <class V> INLINE V k_bits(whole<V> n) {
  V x;
  std::memcpy(&x, &n, sizeof x);
  return x;
}
// 2^n for -127 < n < 128 (-1023 < n < 1024).
template <class V> INLINE V k_power_of_two(whole<V> n) {
  return k_bits<V>(k_single ? (n + 127) << 23 : (n + 1023) << (k_single ? 0 : 52));
}

template <class F, class... V> INLINE auto k_each(F f, V... x) {
  using W = wide<V...>;
  if constexpr (!k_is_vector<W>) {
    return real(f(x...));
  } else {
    W y;
    for (int i = 0; i < k_lanes; ++i) y[i] = f(k_fill<W>(x)[i]...);
    return y;
  }
}

// exp(r) - 1 for |r| <= ln(2) / 2, by its Taylor series: what is left out is below a tenth of an ulp of exp(r).
template <class V> INLINE V k_expm1_small(V r) {
  constexpr real c[] = {1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880,
                        1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
  const V s = r * r;
  if constexpr (k_single) {  // in pairs: half the latency
    const V low = (c[2] + c[3] * r) * s + c[1] * r, high = c[4] + c[5] * r + c[6] * s;
    return r + (r * (low + high * (s * s)));
  } else {
    V p = k_fill<V>(c[12]);
    for (int i = 11; i >= 1; --i) p = p * r + c[i];
    return r + (s * p);
  }
}
// x = n ln(2) + r, with |r| <= ln(2) / 2.
template <class V> INLINE whole<V> k_split(V x, V& r) {
  // Adding 1.5 * 2^23 (2^52) rounds to a whole number, which then stands in the last bits.
  constexpr real magic = k_single ? 12582912.0 : 6755399441055744.0;
  const V shifted = x * real(1.4426950408889634074) + magic;
  const V m = shifted - magic;
  whole<V> n, zero;
  const V origin = k_fill<V>(magic);
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&zero, &origin, sizeof n);
  n = n - zero;
  // ln(2) in two parts, the first with so few digits that its product with n is exact.
  r = k_single ? (x - m * real(0.693359375)) - m * real(-2.12194440054690583e-4)
               : (x - m * real(6.93147180369123816490e-01)) - m * real(1.90821492927058770002e-10);
  return n;
}
// NaN stays NaN: comparisons with it are false.
template <class V> INLINE V k_between(V x, real low, real high) {
  x = x < low ? k_fill<V>(low) : x;
  return x > high ? k_fill<V>(high) : x;
}
// exp(x), or what would overflow to infinity when it is rounded: fused with a sum, a product is not.
template <class V> INLINE V k_exp_unrounded(V x) {
  V r;
  const whole<V> n = k_split<V>(k_between<V>(x, k_single ? -104 : -746, k_single ? 89 : 710), r);
  const whole<V> half = n >> 1;  // 2^n alone would leave the range of exponents at either end
  return (k_expm1_small<V>(r) + real(1)) * k_power_of_two<V>(half) * k_power_of_two<V>(n - half);
}
template <class V> INLINE V k_exp(V x) {
  constexpr real most = k_single ? 88.73 : 709.79;
  return x > most ? k_fill<V>(std::numeric_limits<real>::infinity()) : k_exp_unrounded<V>(x);
}
template <class V> INLINE V k_expm1_scaled(V x) {
  V r;
  const V power = k_power_of_two<V>(k_split<V>(x, r));
  return k_expm1_small<V>(r) * power + (power - real(1));
}
template <class V> INLINE V k_expm1(V x) {
  const V y = k_expm1_scaled<V>(k_between<V>(x, k_single ? -40 : -80, k_single ? 40 : 80));
  return k_with_sign<V>(x > real(k_single ? 40 : 80) ? k_exp<V>(x) : y, x);
}
// With q = exp(-2|x|): (1 - q) / (1 + q) where |x| is small, its numerator computed without cancelling, and
// 1 - 2 q / (1 + q) elsewhere, so that the derivative 1 - tanh(x)^2 keeps its digits too.
template <class V> INLINE V k_tanh(V x) {
  V r;
  const V size = k_with_sign(x, k_fill<V>(real(1)));
  const V power = k_power_of_two<V>(k_split<V>(k_between<V>(real(-2) * size, k_single ? -40 : -80, 0), r));
  const V p = k_expm1_small<V>(r);
  const V q = p * power + power;
  const V small = real(-1) * (p * power + (power - real(1)));
  const V ratio = (size < real(0.55) ? small : q + q) / (real(1) + q);
  return k_with_sign<V>(size < real(0.55) ? ratio : real(1) - ratio, x);
}
template <class V> INLINE V k_sigmoid(V x) { return real(1) / (real(1) + k_exp_unrounded<V>(-x)); }

template <class V> INLINE V k_copy(V x) { return x; }
template <class V> INLINE V k_neg(V x) { return -x; }
template <class V> INLINE V k_square(V x) { return x * x; }
template <class V> INLINE V k_cube(V x) { return x * x * x; }
template <class V> INLINE V k_abs(V x) { return k_with_sign(x, k_fill<V>(real(1))); }
template <class V> INLINE V k_reciprocal(V x) { return real(1) / x; }
template <class V> INLINE V k_relu(V x) { return x < 0 ? k_fill<V>(real(0)) : x; }
template <class V> INLINE V k_sqrt(V x) { return k_each([](real a) { return std::sqrt(a); }, x); }
template <class V> INLINE V k_rsqrt(V x) { return real(1) / k_sqrt<V>(x); }
template <class V> INLINE V k_sign(V x) {
  const V one = k_fill<V>(real(1)), zero = k_fill<V>(real(0));
  return (x > 0 ? one : zero) - (x < 0 ? one : zero);
}
// The inverse of erf as PyTorch computes it: a quotient of polynomials, and two steps of Newton's method.
inline double erfinv(double y) {
  const double size = std::fabs(y);
  if (!(size < 1)) return size == 1 ? std::copysign(INFINITY, y) : NAN;
  double x;
  if (size <= 0.7) {
    const double z = y * y;
    x = y * (((-0.140543331 * z + 0.914624893) * z - 1.645349621) * z + 0.886226899) /
        ((((0.012229801 * z - 0.329097515) * z + 1.442710462) * z - 2.118377725) * z + 1);
  } else {
    const double z = std::sqrt(-std::log((1 - size) / 2));
    x = std::copysign(((1.641345311 * z + 3.429567803) * z - 1.624906493) * z - 1.970840454, y) /
        ((1.637067800 * z + 3.543889200) * z + 1);
  }
  const double slope = 1.1283791670955126;  // of erf at 0
  for (int step = 0; step < 2; ++step) x -= (std::erf(x) - y) / (slope * std::exp(-x * x));
  return x;
}
#define K_LIBRARY(name, function) \
  template <class V> INLINE V k_##name(V x) { return k_each([](real a) { return function(a); }, x); }
K_LIBRARY(ceil, std::ceil)
K_LIBRARY(floor, std::floor)
K_LIBRARY(round, std::nearbyint)
K_LIBRARY(trunc, std::trunc)
K_LIBRARY(sin, std::sin)
K_LIBRARY(cos, std::cos)
K_LIBRARY(tan, std::tan)
K_LIBRARY(asin, std::asin)
K_LIBRARY(acos, std::acos)
K_LIBRARY(atan, std::atan)
K_LIBRARY(sinh, std::sinh)
K_LIBRARY(cosh, std::cosh)
K_LIBRARY(asinh, std::asinh)
K_LIBRARY(acosh, std::acosh)
K_LIBRARY(atanh, std::atanh)
K_LIBRARY(erf, std::erf)
K_LIBRARY(erfc, std::erfc)
K_LIBRARY(erfinv, erfinv)
K_LIBRARY(exp2, std::exp2)
K_LIBRARY(log, std::log)
K_LIBRARY(log2, std::log2)
K_LIBRARY(log10, std::log10)
K_LIBRARY(log1p, std::log1p)

template <class A, class B> INLINE wide<A, B> k_pow(A a, B b) {
  return k_each([](real x, real y) { return std::pow(x, y); }, a, b);
}
template <class A, class B> INLINE wide<A, B> k_atan2(A a, B b) {
  return k_each([](real x, real y) { return std::atan2(x, y); }, a, b);
}
template <class A, class B> INLINE wide<A, B> k_fmod(A a, B b) {
  return k_each([](real x, real y) { return std::fmod(x, y); }, a, b);
}
// A comparison with NaN is false, so that a NaN in either argument is returned.
template <class A, class B> INLINE wide<A, B> k_maximum(A a, B b) {
  const auto x = k_fill<wide<A, B>>(a), y = k_fill<wide<A, B>>(b);
  return y != y ? y : (x < y ? y : x);
}
template <class A, class B> INLINE wide<A, B> k_minimum(A a, B b) {
  const auto x = k_fill<wide<A, B>>(a), y = k_fill<wide<A, B>>(b);
  return y != y ? y : (y < x ? y : x);
}
// Truth values are 0 and 1, and anything but 0 is true.
template <class C, class A, class B> INLINE wide<C, A, B> k_where(C c, A a, B b) {
  using W = wide<C, A, B>;
  return k_fill<W>(c) != 0 ? k_fill<W>(a) : k_fill<W>(b);
}
#define K_TEST(name, test)                                                  \
  template <class A, class B> INLINE wide<A, B> k_##name(A a, B b) {        \
    using W = wide<A, B>;                                                   \
    const W x = k_fill<W>(a), y = k_fill<W>(b);                             \
    return (test) ? k_fill<W>(real(1)) : k_fill<W>(real(0));                \
  }
K_TEST(eq, x == y)
K_TEST(ne, x != y)
K_TEST(lt, x < y)
K_TEST(le, x <= y)
K_TEST(gt, x > y)
K_TEST(ge, x >= y)
K_TEST(logical_and, (x != 0) & (y != 0))
K_TEST(logical_or, (x != 0) | (y != 0))
template <class V> INLINE V k_logical_not(V x) { return x == 0 ? k_fill<V>(real(1)) : k_fill<V>(real(0)); }
