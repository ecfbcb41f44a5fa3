// More about vectors: masks as bits, results that no fused multiply-add takes up, minimum, the largest lane, lanes
// moved between two vectors.
#pragma once

#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

// Bit i is the truth value of lane i.
template <class C>
inline uint32_t lane_bits(Mask<C> mask) {
#if PYDL_VEC_BYTES == 64
  return mask;
#elif PYDL_VEC_BYTES == 32
  if constexpr (sizeof(C) == 4) return uint32_t(_mm256_movemask_ps((__m256)mask));
  if constexpr (sizeof(C) == 8) return uint32_t(_mm256_movemask_pd((__m256d)mask));
#elif defined(__x86_64__)
  if constexpr (sizeof(C) == 4) return uint32_t(_mm_movemask_ps((__m128)mask));
  if constexpr (sizeof(C) == 8) return uint32_t(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<C>; ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
#endif
}

// The value after its own rounding. Compilers fuse a product into a following sum, which then is rounded once and
// differs from one instruction set to the next.
template <class V>
inline V rounded(V value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

// Minimum of numbers; where a lane of either is NaN the result is b's.
inline VecF min_number(VecF a, VecF b) {
#if PYDL_VEC_BYTES == 64
  return (VecF)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#elif PYDL_VEC_BYTES == 32
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (VecF)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
inline VecD min_number(VecD a, VecD b) {
#if PYDL_VEC_BYTES == 64
  return (VecD)_mm512_maskz_min_pd(-1, (__m512d)a, (__m512d)b);
#elif PYDL_VEC_BYTES == 32
  return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  return (VecD)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}

// The largest lane of a vector without NaN.
template <class V>
inline lane_t<V> largest(V v) {
  constexpr int n = kLanesOf<V>;
  if constexpr (n == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typedef VecN<lane_t<V>, n / 2> HalfVec;
    HalfVec halves[2];
    __builtin_memcpy(halves, &v, sizeof(V));
    return largest<HalfVec>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

template <int... I, class V>
inline V pick(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef decltype(a > b) Order;  // the integer vector that __builtin_shuffle wants
  return __builtin_shuffle(a, b, Order{I...});
#endif
}
template <int START, class V, int... I>
inline V window(V a, V b, Indices<I...>) {
  return pick(a, b, Indices<(START + I)...>{});
}
// A whole vector from a followed by b, beginning at element START.
template <int START, class V>
inline V window(V a, V b) {
  return window<START>(a, b, indices<kLanesOf<V>>{});
}
template <int START, class V, int... I>
inline V alternate(V a, V b, Indices<I...>) {
  return pick(a, b, Indices<(START + I / 2 + I % 2 * kLanesOf<V>)...>{});
}
// a[0], b[0], a[1], b[1], ...: the first and the second vector of them.
template <class V>
inline V interleave_low(V a, V b) {
  return alternate<0>(a, b, indices<kLanesOf<V>>{});
}
template <class V>
inline V interleave_high(V a, V b) {
  return alternate<kLanesOf<V> / 2>(a, b, indices<kLanesOf<V>>{});
}

}  // namespace
}  // namespace pydl::PYDL_ISA
