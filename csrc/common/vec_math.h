// Exponentials and logarithms of SIMD values, in natural units and base 2, for CPU kernels.
//
// exp is split into 2^k and a factor in [0.7, 1.42], by subtracting k ln 2 in two pieces (Cody and Waite, "Software
// Manual for the Elementary Functions", 1980), and a minimax polynomial. Relative errors are near one ulp; NaN stays
// NaN.
#pragma once

#include "common/lanes.h"

namespace pydl::PYDL_ISA {
namespace {

template <class C>
struct FloatBits;
template <>
struct FloatBits<float> {
  static constexpr int32_t mantissa = 23, bias = 127;
  static constexpr int32_t root_half = 0x3f3504f3;  // sqrt(1/2)
  static constexpr float exp_low = -86.5f, exp_high = 89.0f, exp2_low = -125.0f;
};
template <>
struct FloatBits<double> {
  static constexpr int64_t mantissa = 52, bias = 1023;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double exp_low = -708.0, exp_high = 710.0, exp2_low = -1021.0;
};

// Nearest integers, ties to even, of any magnitude.
inline VecF round_even(VecF v) {
#if PYDL_VEC_BYTES == 64
  return (VecF)_mm512_maskz_roundscale_ps(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PYDL_VEC_BYTES == 32
  return (VecF)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__SSE4_1__)
  return (VecF)_mm_round_ps((__m128)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_rintf(v[i]);
  return v;
#endif
}
inline VecD round_even(VecD v) {
#if PYDL_VEC_BYTES == 64
  return (VecD)_mm512_maskz_roundscale_pd(-1, (__m512d)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PYDL_VEC_BYTES == 32
  return (VecD)_mm256_round_pd((__m256d)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__SSE4_1__)
  return (VecD)_mm_round_pd((__m128d)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_rint(v[i]);
  return v;
#endif
}

// c[0] + x (c[1] + x (c[2] + ...)).
template <class V, class C, int N>
inline V polynomial(V x, const C (&c)[N]) {
  V value = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) value = value * x + c[i];
  return value;
}

// exp(r) for |r| <= ln(2) / 2 and a little more.
inline VecF exp_small(VecF r) {
  constexpr float c[] = {1.0f, 1.0f, 0.49999993052f, 0.166665147936f, 0.0416684564661f, 0.00836941872f, 0.00138131605f};
  return polynomial(r, c);
}
inline VecD exp_small(VecD r) {
  constexpr double c[] = {1.0,
                          1.0,
                          0.50000000000000117007,
                          0.16666666666666386189,
                          0.041666666666519156215,
                          0.0083333333335077341244,
                          0.0013888888946919486485,
                          0.00019841269486007261162,
                          0.000024801489352447347002,
                          2.7557597317855192446e-6,
                          2.763168737407186231e-7,
                          2.4998953697063096751e-8};
  return polynomial(r, c);
}

// exp(x) = factor * 2^power with an integer power, for x of any size: exp(-inf) has the power -inf and a finite factor.
// NaN is in the factor.
template <class C>
struct Exp {
  Vec<C> factor, power;
};
template <class C>
inline Exp<C> split_exp(Vec<C> x) {
  constexpr C log2_e = C(1.4426950408889634074);
  // The first piece has so few digits that its product with k is exact.
  constexpr C ln2_high = sizeof(C) == 4 ? C(0.693359375) : C(0x1.62e42fefa38p-1);
  constexpr C ln2_low = sizeof(C) == 4 ? C(-2.12194440054690583e-4) : C(0x1.ef35793c7673p-45);
  const Vec<C> k = round_even(x * log2_e);
  Vec<C> r = (x - k * ln2_high) - k * ln2_low;
  r = min_number(max_number(r, splat(C(-0.35))), splat(C(0.35)));  // infinite x, or so large that k ln 2 is inexact
  return {select<C>(is_nan(x), x, exp_small(r)), k};
}

// scale_down: v * 2^d for integers d <= 0, -inf among them; 2^d may be 0 where it is subnormal.
// scale: v * 2^k for integers k from the smallest normal exponent to the largest + 1.
#if PYDL_VEC_BYTES == 64
inline VecF scalef(VecF v, VecF k) { return (VecF)_mm512_maskz_scalef_ps(-1, (__m512)v, (__m512)k); }
inline VecD scalef(VecD v, VecD k) { return (VecD)_mm512_maskz_scalef_pd(-1, (__m512d)v, (__m512d)k); }
template <class C>
inline Vec<C> scale_down(Vec<C> v, Vec<C> d) {
  return scalef(v, d);
}
template <class C>
inline Vec<C> scale(Vec<C> v, Vec<C> k) {
  return scalef(v, k);
}
#else
template <class C>
inline Vec<C> scale_down(Vec<C> v, Vec<C> d) {
  // Adding 2^mantissa leaves the integer in the low bits; shifting them up makes them the exponent of a float.
  using B = FloatBits<C>;
  const Vec<C> exponent = max_number(d + C(B::bias), Vec<C>{}) + C(int_t<C>(1) << B::mantissa);
  return v * (Vec<C>)((IntVec<C>)exponent << B::mantissa);
}

template <class C>
inline Vec<C> scale(Vec<C> v, Vec<C> k) {
  using B = FloatBits<C>;
  const Vec<C> exponent = k + C((int_t<C>(1) << B::mantissa) + B::bias - 1);
  return (v * C(2)) * (Vec<C>)((IntVec<C>)exponent << B::mantissa);
}
#endif

// e^x and 2^x; results below the smallest normal numbers, and a little above, are 0.
template <class C>
inline Vec<C> exp(Vec<C> x) {
  using B = FloatBits<C>;
  // NaN must be the second operand to stay.
  const Vec<C> inside = min_number(splat(B::exp_high), max_number(splat(B::exp_low), x));
  const Exp<C> e = split_exp<C>(inside);
  return select<C>(greater(splat(B::exp_low), x), Vec<C>{}, scale<C>(e.factor, e.power));
}
template <class C>
inline Vec<C> exp2(Vec<C> x) {
  using B = FloatBits<C>;
  const Vec<C> inside = min_number(splat(C(B::bias + 1)), max_number(splat(B::exp2_low), x));
  const Vec<C> k = round_even(inside);
  const Vec<C> value = scale<C>(exp_small((inside - k) * C(0.69314718055994530942)), k);
  return select<C>(greater(splat(B::exp2_low), x), Vec<C>{}, value);
}

// log2(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)].
inline VecF log2_near_one(VecF f) {
  constexpr float c[] = {1.442694995839f,  -0.721347505617f, 0.480910740948f,  -0.360687650240f, 0.287908653736f,
                         -0.239336125492f, 0.216186553834f,  -0.204585828791f, 0.121120512701f};
  return f * polynomial(f, c);
}
inline VecD log2_near_one(VecD f) {
  constexpr double c[] = {2.885390081777926811427282,  0.9617966939259898745557796, 0.5770780163454408861640221,
                          0.4121985858570894339877547, 0.3205985333413726237885698, 0.2623344309095754382996191,
                          0.2209111460531868802745231, 0.2136777777415004197291951};
  const VecD s = f / (f + 2.0);
  return s * polynomial(s * s, c);
}

template <class C>
inline Vec<C> to_float(IntVec<C> k) {
  if constexpr (sizeof(C) == 4) {
    return __builtin_convertvector(k, Vec<C>);
  } else {  // by bits, as few levels have an instruction for 64-bit integers; |k| < 2^51
    constexpr double magic = 0x1.8p52;
    return (VecD)((IntVec<double>)splat(magic) + k) - magic;
  }
}

// log2(x) of normal numbers x > 0; the absolute error is within an ulp of 1 where x is near 1.
template <class C>
inline Vec<C> log2_normal(Vec<C> x) {
  using B = FloatBits<C>;
  const IntVec<C> k = ((IntVec<C>)x - B::root_half) >> B::mantissa;
  const Vec<C> f = (Vec<C>)((IntVec<C>)x - (k << B::mantissa)) - C(1);
  return log2_near_one(f) + to_float<C>(k);
}
// The same with log2(0) = -inf, and NaN of NaN.
template <class C>
inline Vec<C> log2(Vec<C> x) {
  return select<C>(greater(x, Vec<C>{}), log2_normal<C>(x), select<C>(is_nan(x), x, splat(-kInfinity<C>)));
}

inline VecF square_root(VecF v) {
#if PYDL_VEC_BYTES == 64
  return (VecF)_mm512_maskz_sqrt_ps(-1, (__m512)v);
#elif PYDL_VEC_BYTES == 32
  return (VecF)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (VecF)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
inline VecD square_root(VecD v) {
#if PYDL_VEC_BYTES == 64
  return (VecD)_mm512_maskz_sqrt_pd(-1, (__m512d)v);
#elif PYDL_VEC_BYTES == 32
  return (VecD)_mm256_sqrt_pd((__m256d)v);
#elif defined(__x86_64__)
  return (VecD)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// x^-0.75, with inf of 0, 0 of inf and NaN of negative numbers.
inline VecD power_minus_three_quarters(VecD x) {
  const VecD root = square_root(x);
  return 1.0 / (root * square_root(root));
}
inline VecF power_minus_three_quarters(VecF x) {
#if PYDL_VEC_BYTES == 64
  // Roots and quotients of 16 lanes take some 60 cycles. Estimates z of 14 bits take a few, and since z^4 x^3 = 1 is
  // where z should be, one step of Newton's method for z^-4 = x^3 makes them exact but for rounding.
  const VecF root = (VecF)_mm512_maskz_rsqrt14_ps(-1, (__m512)x);
  const VecF z = root * (root * (VecF)_mm512_maskz_rsqrt14_ps(-1, (__m512)root));
  const VecF quarter = z * x;  // x^0.25: no product leaves the range
  const VecF better = z + z * (0.25f - 0.25f * (quarter * quarter * (z * quarter)));
  return select<float>(is_nan(better), root, better);  // of 0 and inf the first estimate is exact
#else
  const VecF root = square_root(x);
  return 1.0f / (root * square_root(root));
#endif
}

// x^exponent as C's pow has it, for any x and finite exponents; results below 2^exp2_low are 0.
template <class C>
struct Power {
  explicit Power(double exponent) : whole(C(exponent)) {
    using B = FloatBits<C>;
    // So few digits that the product with a binary exponent is exact.
    constexpr int_t<C> low_half = (int_t<C>(1) << (B::mantissa / 2 + 1)) - 1;
    high = __builtin_bit_cast(C, __builtin_bit_cast(int_t<C>, whole) & ~low_half);
    low = C(exponent - double(high));
    at_zero = exponent < 0 ? kInfinity<C> : exponent == 0 ? C(1) : C(0);
    at_infinity = exponent < 0 ? C(0) : exponent == 0 ? C(1) : kInfinity<C>;
    at_nan = exponent == 0 ? C(1) : C(__builtin_nan(""));
    const double half = exponent / 2;
    const bool even = half == __builtin_floor(half), integer = exponent == __builtin_floor(exponent);
    negative = even ? C(1) : integer ? C(-1) : C(__builtin_nan(""));
  }

  Vec<C> operator()(Vec<C> x) const {
    using B = FloatBits<C>;
    constexpr int_t<C> one = int_t<C>(1);
    constexpr C least = __builtin_bit_cast(C, one << B::mantissa), step = C(one << B::mantissa);
    Vec<C> size = (Vec<C>)((IntVec<C>)x & (int_t<C>)(~(one << (8 * sizeof(C) - 1))));
    const Mask<C> subnormal = greater(splat(least), size);
    const Vec<C> mantissa = select<C>(subnormal, size * step, size);
    const IntVec<C> k = ((IntVec<C>)mantissa - B::root_half) >> B::mantissa;
    const Vec<C> f = (Vec<C>)((IntVec<C>)mantissa - (k << B::mantissa)) - C(1);
    const Vec<C> binary = to_float<C>(k) - select<C>(subnormal, splat(C(B::mantissa)), Vec<C>{});
    const Vec<C> exact = binary * high, n = round_even(exact), rest = binary * low + log2_near_one(f) * whole;
    const Vec<C> m = round_even((exact - n) + rest), power = n + m;
    const Vec<C> top = splat(C(B::bias + 1)), bottom = splat(B::exp2_low);
    const Vec<C> inside = min_number(top, max_number(bottom, power));
    Vec<C> value = scale<C>(exp_small((((exact - n) - m) + rest) * C(0.69314718055994530942)), inside);
    value = select<C>(greater(power, top), splat(kInfinity<C>), value);
    value = select<C>(greater(bottom, power), Vec<C>{}, value);
    value = select<C>(greater(size, Vec<C>{}), value, splat(at_zero));
    value = select<C>(greater(splat(kInfinity<C>), size), value, splat(at_infinity));
    value = select<C>(greater(Vec<C>{}, x), value * negative, value);
    return select<C>(is_nan(x), splat(at_nan), value);
  }

  C whole, high, low, at_zero, at_infinity, at_nan, negative;
};

// Moves the powers of two out of the factors, which are then in [1, 2); of 0 and NaN nothing is moved.
template <class C>
inline Exp<C> normalize(Exp<C> v) {
  using B = FloatBits<C>;
  constexpr int_t<C> one = int_t<C>(B::bias) << B::mantissa, fraction = (int_t<C>(1) << B::mantissa) - 1;
  const IntVec<C> bits = (IntVec<C>)v.factor;
  const Mask<C> normal = greater(v.factor, Vec<C>{});
  const Vec<C> power = v.power + to_float<C>((bits >> B::mantissa) - B::bias);
  return {select<C>(normal, (Vec<C>)((bits & fraction) | one), v.factor), select<C>(normal, power, v.power)};
}

// The largest lane, and the largest of n elements in memory; NaN is passed over.
template <class C>
inline C maximum(Vec<C> v) {
  C top = v[0];
  for (int i = 1; i < kLanes<C>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
template <class T>
inline compute_t<T> maximum(const T* x, int64_t n) {
  using C = compute_t<T>;
  const Vec<C> least = splat(-kInfinity<C>);
  Vec<C> top[4] = {least, least, least, least};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) { top[slot] = max_number(load(x + i, extent, least), top[slot]); });
  return maximum<C>(max_number(max_number(top[0], top[1]), max_number(top[2], top[3])));
}

}  // namespace
}  // namespace pydl::PYDL_ISA
